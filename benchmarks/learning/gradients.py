"""How noisy is the policy gradient of each objective, on the same rollouts?

    python benchmarks/learning/gradients.py --json benchmarks/learning/gradients.json

Batches of 8 questions x 8 samples, as a training step draws them, from the model that the runs
start from. For every batch the gradient g of the loss with respect to all weights is taken, on
policy, under several scores. Of n batches, without bias:

    signal |E g|^2 = (|sum g|^2 - sum |g|^2) / (n (n - 1)),  noise tr Var g = sum |g|^2 / n - signal

and batches = noise / signal is how many batches must be averaged until signal equals noise.
`argmax` scores a soft position by log q of its heaviest candidate, as if that token had been drawn:
the conditional mean of the exact score given that token. Scores of one kind of rollout share its
rollouts: a weight floor, clipped noise (`official`) or drawn tokens are other kinds.

A kind that is done stands in the JSON with the machine's name, and is not measured again: called
anew, the command goes on where it was stopped. `--kinds 'soft*' 'multiplex*'` chooses.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from cells import HERE
from torch import Tensor
from transformers import AutoTokenizer

from softgrpo.algorithm.advantages import group_advantages
from softgrpo.algorithm.loss import token_weights
from softgrpo.config import Config
from softgrpo.data.training import TrainingData
from softgrpo.learner.policy import Policy
from softgrpo.rewards import RewardRunner
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.sampling import (
    ROLLOUT_STREAM,
    Sampling,
    collect,
    density_settings,
    rollout_uids,
)
from softgrpo_engine import LLM
from softgrpo_engine.model.weights import load_decoder
from softgrpo_kernels.methods import method_of

sys.path.insert(1, str(HERE.parent))
from _machine import device_name

SOFT, OBJECTIVE = "rollout.soft", "algorithm.objective"
MULTIPLEX = (f"{SOFT}.noise=multiplex", f"{SOFT}.noise_scale=3", f"{SOFT}.tau=1.0")


def kinds(top_p: float) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """Overrides of every kind of rollout at this nucleus, and the scores that it is given."""
    found: dict[str, tuple[tuple[str, ...], list[str]]] = {
        "discrete": (("rollout.soft.enabled=false",), ["exact"]),
        "multiplex 3": ((*MULTIPLEX, f"{OBJECTIVE}=per_slot"), ["per_slot"]),
    }
    for tau in (0.1, 0.5, 1.0):
        at = f"{SOFT}.tau={tau}"
        found[f"official, tau {tau}"] = ((at, f"{OBJECTIVE}=official"), ["official"])
        found[f"soft, tau {tau}"] = ((at,), ["exact", "concrete", "argmax"])
        for floor in (0.1, 0.01):
            floored = (at, f"{SOFT}.weight_floor={floor}", f"{OBJECTIVE}=censored")
            found[f"soft, tau {tau}, floor {floor}"] = (floored, ["censored", "argmax"])
    nucleus = (f"{SOFT}.top_p={top_p}", f"rollout.top_p={top_p}")
    end = "" if top_p == 0.95 else f", top_p {top_p:g}"
    return {name + end: ((*nucleus, *own), scores) for name, (own, scores) in found.items()}


KINDS = kinds(0.95) | kinds(1.0)


class Moments:
    """Sums over batches of gradients, in float64 where they are scalars."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares = 0.0
        self.count = 0

    def add(self, gradient: Tensor) -> None:
        self.total = gradient.clone() if self.total is None else self.total.add_(gradient)
        self.squares += _dot(gradient, gradient)
        self.count += 1

    def row(self) -> dict[str, float]:
        assert self.total is not None
        n = self.count
        signal = (_dot(self.total, self.total) - self.squares) / (n * (n - 1))
        noise = self.squares / n - signal
        batches = noise / signal if signal > 0 else float("inf")
        return {"signal": signal, "noise": noise, "batches": batches, "n": n}


def _dot(a: Tensor, b: Tensor) -> float:
    """Summed by blocks: a float32 sum of 1e8 squares would lose digits."""
    blocks = zip(a.split(2**20), b.split(2**20), strict=True)
    return float(sum(torch.dot(x, y).double() for x, y in blocks))


def gradient(policy: Policy, batch: RolloutBatch, advantages_S: Tensor) -> Tensor:
    """Gradient [P] of the on-policy loss of one batch with respect to all weights, float32."""
    weights_T = token_weights(
        ~batch.soft.forced.bool(), batch.sample_of_token, len(batch.group), "token", 0
    )
    factors_T = -weights_T * advantages_S[batch.sample_of_token]
    parameters = list(policy.decoder.parameters())
    for parameter in parameters:
        parameter.grad = None
    for group in range(batch.num_groups):
        part, rows = batch.select_samples((batch.group == group).nonzero().flatten().tolist())
        if bool((factors_T[rows] != 0).any()):
            density_T = policy(part).density
            (factors_T[rows].to(density_T.device) * density_T).sum().backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )


def measure(model: Path, data: Path, kind: str, batches: int) -> dict[str, dict[str, float]]:
    """The moments of every score of one kind of rollout."""
    overrides, scores = KINDS[kind]
    paths = [f"data.{split}={data}/easy_{split}.jsonl" for split in ("train", "eval")]
    config = Config.load(str(HERE / "easy.yaml"), [*paths, f"model.path={model}", *overrides])
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    questions = TrainingData(config)
    questions.prepare(tokenizer)
    llm = LLM(model, tokenizer=tokenizer, max_model_len=512)
    decoder = load_decoder(model, torch.float32, llm.device)
    settings = density_settings(config)
    policies: dict[str, Policy] = {}
    for score in scores:
        scored = dataclasses.replace(settings, method=method_of(config.rollout.soft.noise, score))
        policies[score] = Policy(decoder, scored)
    rewards = RewardRunner(config.reward)
    moments: defaultdict[str, Moments] = defaultdict(Moments)
    for step in range(batches):
        prompts = questions.prompts_of_round(step, config.rollout.prompts_per_step)
        uids = rollout_uids(step, len(prompts), config.rollout.group_size)
        token_ids = [prompt.token_ids for prompt in prompts]
        outputs = collect(llm, token_ids, uids, Sampling.of_step(config, config.rollout))
        rewards_S, _ = rewards.score(prompts, outputs)
        batch = RolloutBatch.from_outputs(outputs, seed=0, stream=ROLLOUT_STREAM, weight_version=0)
        advantages_S = group_advantages(rewards_S, batch.group, config.algorithm.advantage)
        for score, policy in policies.items():
            moments[score].add(gradient(policy, batch, advantages_S))
    rewards.close()
    return {score: found.row() for score, found in moments.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--json", type=Path, default=HERE / "gradients.json")
    parser.add_argument("--kinds", nargs="+", default=["*"], help="patterns, as 'soft, tau 1*'")
    arguments = parser.parse_args()
    chosen = [k for k in KINDS if any(fnmatch.fnmatch(k, p) for p in arguments.kinds)]
    if not chosen:
        parser.error(f"no kind is called {' or '.join(arguments.kinds)}: {'; '.join(KINDS)}")
    model, data = arguments.runs / "easy" / "format-0" / "model", arguments.runs / "data"
    if not (model / "config.json").exists():
        parser.error(f"no model in {model}: experiment.py trains it before its first cell")
    rows: list[dict[str, Any]] = []
    if arguments.json.exists():
        rows = json.loads(arguments.json.read_text())
    done = {row["rollouts"] for row in rows}
    print("| rollouts | score | signal | noise | batches |\n|---|---|---|---|---|")
    for kind in chosen:
        if kind not in done:
            moments = measure(model, data, kind, arguments.batches)
            names = {"machine": device_name(), "rollouts": kind}
            rows += [{**names, "score": score, **row} for score, row in moments.items()]
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        for row in rows:
            if row["rollouts"] == kind:
                shown = f"{row['signal']:.4f} | {row['noise']:.3f} | {row['batches']:.1f}"
                print(f"| {kind} | {row['score']} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
