"""How long a step takes on 1 to 512 GPUs, and who waits: a simulation of its rollout and update.

    python benchmarks/scale.py                               # paper-1.5b: the tables
    python benchmarks/scale.py --recipe paper-7b --mean 4417 --json FILE --picture FILE

Lengths of responses are drawn from a lognormal that is cut at the length limit and has the mean and
the share of cut responses that the authors' runs logged; half of the variance of the logarithm is
that of prompts, so that the samples of a group are long together. Rates are those of `--plan`.

- synchronous: every GPU has its prompts from the start.
- queued: a GPU takes its next prompt when it has room for a group of samples.
- ahead: the rollout of the next step runs during the update (`rollout.ahead`). Two bounds: the two
  take turns on a GPU, or do not disturb each other.
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import asdict, astuple, dataclass
from math import exp, log, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from softgrpo.config import Config
from softgrpo.tools.plan.depth import peaks_and_flops
from softgrpo.tools.plan.model import model_config
from softgrpo.tools.plan.seconds import Hardware, Size, decode_step, kv_cache, seconds
from softgrpo.tools.plan.walk import GPUS_OF_A_NODE, OLD, REFERENCE, SYNC, UPDATE, Share
from softgrpo_engine.model.config import DecoderConfig

GPUS = (1, 8, 64, 512)
BETWEEN = 0.5  # of the variance of log length: of prompts; the rest is of a prompt's samples
STEPS = 8  # simulated, for the mean
PROMPT = 150  # tokens


@dataclass(frozen=True)
class Lengths:
    """Response lengths min(X, limit), X lognormal with these parameters."""

    mu: float
    sigma: float
    limit: int

    @staticmethod
    def fitted(mean: float, cut: float, limit: int) -> Lengths:
        """With that mean of the cut lengths and that share of cut ones, by bisection in sigma."""
        low, high = 1e-3, 5.0
        z = NormalDist().inv_cdf(1.0 - cut)
        for _ in range(100):
            sigma = (low + high) / 2
            mu = log(limit) - sigma * z
            if _mean_cut(mu, sigma, limit) > mean:
                low = sigma  # a wider spread with the same share above the limit has a lower mean
            else:
                high = sigma
        return Lengths(mu, sigma, limit)

    def draw(self, prompts: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths [prompts, samples]."""
        of_prompt = rng.standard_normal((prompts, 1)) * sqrt(BETWEEN)
        of_sample = rng.standard_normal((prompts, samples)) * sqrt(1.0 - BETWEEN)
        lengths = np.exp(self.mu + self.sigma * (of_prompt + of_sample))
        return np.clip(np.ceil(lengths), 1, self.limit).astype(int)


def _mean_cut(mu: float, sigma: float, limit: float) -> float:
    z, below = (log(limit) - mu) / sigma, NormalDist().cdf
    return exp(mu + sigma**2 / 2) * below(z - sigma) + limit * (1.0 - below(z))


@dataclass(frozen=True)
class Rates:
    """Of one GPU and one recipe. room: samples that are decoded at a time."""

    size: Size
    hardware: Hardware
    room: int

    def step(self, batch: int, cached: float) -> float:
        """Seconds of a decode step over so many samples, with so many tokens in the cache."""
        return decode_step(self.size, self.hardware, batch, cached)


class Gpu:
    """One GPU that decodes. clock: seconds since the rollout began."""

    def __init__(self, rates: Rates, prompt: int) -> None:
        self.rates, self.prompt = rates, prompt
        self.clock = 0.0
        self.steps = 0
        self.ends: list[tuple[int, int]] = []  # a heap: the step at which a sample ends, its length
        self.cached = 0.0

    def take(self, lengths: np.ndarray) -> None:
        """Begins a group of samples."""
        for length in lengths.tolist():
            heapq.heappush(self.ends, (self.steps + length, length))
        self.cached += len(lengths) * self.prompt

    def advance(self) -> None:
        """Decodes until the next sample ends."""
        batch, steps = len(self.ends), self.ends[0][0] - self.steps
        self.clock += steps * self.rates.step(batch, self.cached + batch * steps / 2)
        self.steps += steps
        self.cached += batch * steps
        while self.ends and self.ends[0][0] == self.steps:
            self.cached -= heapq.heappop(self.ends)[1] + self.prompt


def rollout(groups: np.ndarray, gpus: int, rates: Rates, prompt: int, queued: bool) -> np.ndarray:
    """Seconds [gpus] after which each GPU has nothing left to decode.

    groups: lengths [prompts, samples]. queued: the prompts lie in one queue and a GPU takes the
    next when it has room, but no more than an equal share at a time; else each has its share from
    the start, and begins a prompt when it has room.
    """
    prompts, samples = groups.shape
    most = min(rates.room, -(-prompts // gpus) * samples)
    shares = [list(range(r * prompts // gpus, (r + 1) * prompts // gpus)) for r in range(gpus)]
    queue = list(range(prompts))
    workers = [Gpu(rates, prompt) for _ in range(gpus)]
    # Who is first in time takes next; of several at a time, the one that has least.
    turns = [(0.0, 0, rank) for rank in range(gpus)]
    while turns:
        _, _, rank = heapq.heappop(turns)
        gpu, waiting = workers[rank], queue if queued else shares[rank]
        if waiting and len(gpu.ends) + samples <= most:
            gpu.take(groups[waiting.pop(0)])
        elif gpu.ends:
            gpu.advance()
        if gpu.ends or waiting:
            heapq.heappush(turns, (gpu.clock, len(gpu.ends), rank))
    return np.array([gpu.clock for gpu in workers])


@dataclass(frozen=True)
class Step:
    """Seconds of a step; idle: the share of all GPUs' time in which one has nothing to do."""

    rollout: float
    update: float
    seconds: float
    idle: float


def steps_of(
    lengths: np.ndarray, gpus: int, rates: Rates, per_token: float, sync: float
) -> dict[str, Step]:
    """A step in each mode. lengths: [prompts, samples]; per_token: seconds of the passes of the
    update on one GPU, sync: of handing the weights on."""
    # The passes are balanced by samples: no GPU has less than the longest one.
    part = max(lengths.sum() / gpus, float(lengths.max()))
    update = part * per_token + sync
    used = lengths.sum() / gpus * per_token + sync
    modes = {}
    for name, queued in (("synchronous", False), ("queued", True)):
        ends = rollout(lengths, gpus, rates, PROMPT, queued)
        both = ends.max() + update
        modes[name] = Step(ends.max(), update, both, 1.0 - (ends.mean() + used) / both)
    # The rollout goes on during the update: in turns it wins nothing where the GPU with the longest
    # rollout never waits; undisturbed the longer of the two decides.
    longest = max(ends.max(), update)
    modes["ahead, in turns"] = modes["queued"]
    busy = np.maximum(ends, used).mean()
    modes["ahead, undisturbed"] = Step(ends.max(), update, longest, 1.0 - busy / longest)
    return modes


def mean_steps(rounds: list[dict[str, Step]]) -> dict[str, Step]:
    """Of several steps, mode by mode."""
    return {
        mode: Step(*np.mean([astuple(one[mode]) for one in rounds], axis=0).tolist())
        for mode in rounds[0]
    }


def simulate(config: Config, mean: float, cut: float, hardware: Hardware) -> list[dict[str, Any]]:
    """Rows of {batch, gpus, mode, rollout, update, seconds, idle}."""
    model = model_config(config.model.path)
    size = Size.of(DecoderConfig.from_hf(model, ()))
    share = Share.of(config, GPUS_OF_A_NODE)
    _, flops = peaks_and_flops(config, model, GPUS_OF_A_NODE)
    times = seconds(config, size, GPUS_OF_A_NODE, hardware, flops)
    passes = sum(times[phase] for phase in (OLD, REFERENCE, UPDATE) if phase in times)
    per_token = passes / (share.samples * share.response)
    distribution = Lengths.fitted(mean, cut, config.rollout.max_new_tokens)
    rows = []
    # What the KV cache of one GPU, which has the most to do, holds at full length.
    room = kv_cache(config, size, 1) // ((share.prompt + share.response) * size.kv_bytes)
    room = min(config.rollout.max_batch_size, int(room))
    batches = (
        ("the recipe's batch: 64 prompts", room, lambda gpus: config.rollout.prompts_per_step),
        ("32 prompts a GPU, room for 64 samples", 64, lambda gpus: 32 * gpus),
    )
    for batch, room, prompts_of in batches:
        rates = Rates(size, hardware, room)
        rng = np.random.default_rng(0)
        for gpus in GPUS:
            shape = prompts_of(gpus), config.rollout.group_size
            if shape[0] * shape[1] < gpus:
                continue
            rounds = [
                steps_of(distribution.draw(*shape, rng), gpus, rates, per_token, times[SYNC])
                for _ in range(STEPS)
            ]
            for mode, step in mean_steps(rounds).items():
                rows.append({"batch": batch, "gpus": gpus, "mode": mode, **asdict(step)})
    return rows


def draw_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a step over GPUs, and the idle share."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, axes = plt.subplots(2, len(batches), figsize=(9, 6), layout="constrained", sharex=True)
    styles = {"synchronous": "o-", "queued": "s--", "ahead, undisturbed": "^:"}
    for column, batch in enumerate(batches):
        for mode, style in styles.items():
            chosen = [row for row in rows if row["batch"] == batch and row["mode"] == mode]
            x = [row["gpus"] for row in chosen]
            axes[0, column].plot(x, [row["seconds"] for row in chosen], style, label=mode)
            axes[1, column].plot(x, [100 * row["idle"] for row in chosen], style, label=mode)
        axes[0, column].set(xscale="log", yscale="log", title=batch)
        axes[0, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0, column].yaxis.set_minor_formatter(NullFormatter())
        axes[0, column].yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes[1, column].set(xlabel="GPUs", ylim=(0, 100))
        axes[1, column].set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes[0, 0].set(ylabel="seconds of a step")
    axes[0, 1].set_ylim(50, 250)
    axes[1, 0].set(ylabel="idle, %")
    axes[0, 0].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="paper-1.5b")
    parser.add_argument("--mean", type=float, default=5090.0, help="tokens of a response")
    parser.add_argument("--cut", type=float, default=0.3, help="share at the length limit")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    config = Config.load(arguments.recipe)
    rows = simulate(config, arguments.mean, arguments.cut, Hardware())
    print("| batch | GPUs | mode | rollout, s | update, s | step, s | idle |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = " | ".join(f"{row[name]:.1f}" for name in ("rollout", "update", "seconds"))
        print(f"| {row['batch']} | {row['gpus']} | {row['mode']} | {numbers} | {row['idle']:.0%} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"recipe": arguments.recipe, "rows": rows}, indent=1))
    if arguments.picture:
        draw_picture(rows, arguments.picture)


if __name__ == "__main__":
    main()
