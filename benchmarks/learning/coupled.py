"""Of how many rewards does softness decide at all?

    python benchmarks/learning/coupled.py --config demo algorithm.objective=exact

Draws pairs of rollouts that share, at every position, the noise that decides the token, and differ
in the noise that decides the weights of the others only: until a weight changes a later token, both
show the same text. The share of pairs with different rewards, P(R_a != R_b), bounds what training
the weights can win or lose; zero means that a score of the token alone misses nothing.

Gumbel noise of scale c gives g'_i = -c log T_i with independent clocks T_i ~ Exp(rate q_i^(1/c)).
They have no memory: the first to ring, k, and its time t are independent of X_i = (T_i - t)
q_i^(1/c) ~ Exp(1). So g'_k and k come from the pair's noise, and of the others
g'_i = -c log(t + X_i / q_i^(1/c)) with X_i from the sample's own: each sample alone has the law of
an ordinary one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from softgrpo import Config
from softgrpo.data.training import TrainingData
from softgrpo.rewards import RewardRunner
from softgrpo.rollout.sampling import Sampling, collect, rollout_uids
from softgrpo_engine.hf_engine import HFEngine
from softgrpo_engine.model.source import resolve_model
from softgrpo_kernels import SoftToken, gumbel_noise
from softgrpo_kernels.methods import method_of

# Streams of the noise: 0 and 1 are those of rollouts and evaluation.
PAIRS, OWN = 2, 3


def with_own_rest(gprime: Tensor, logq: Tensor, rest: Tensor, scale: float = 1.0) -> Tensor:
    """g' [N, K] in which slot 0, the largest, stays, and the clocks of the others ring anew.

    logq: [N, K]; slots that are not live have g' -inf. rest: [N, K], numbers X ~ Exp(1).
    """
    first = torch.exp(-gprime[:, :1].double() / scale)
    clocks = first + rest.double() * torch.exp(-logq.double() / scale)
    live = gprime > -torch.inf
    others = torch.where(live, -scale * clocks.log(), -torch.inf).to(gprime.dtype)
    return torch.cat([gprime[:, :1], others[:, 1:]], -1)


class CoupledEngine(HFEngine):
    """Samples 2 p and 2 p + 1 are pair p; they share all of their noise but the rest's."""

    def draw(self, logits_BV: Tensor, **arguments: Any) -> SoftToken:
        uid, scale = arguments["uid"], float(arguments.get("noise_scale", 1.0))
        drawn = super().draw(logits_BV, **{**arguments, "uid": uid // 2, "stream": PAIRS})
        noise = gumbel_noise(drawn.ids, arguments["seed"], arguments["position"], uid, OWN)
        gprime = with_own_rest(drawn.gprime, drawn.logp, torch.exp(-noise.double()), scale)
        gprime = torch.where(drawn.kind[:, None] == 1, gprime, drawn.gprime)
        gprime, order = gprime.sort(dim=-1, descending=True, stable=True)
        return dataclasses.replace(
            drawn, gprime=gprime, ids=drawn.ids.gather(1, order), logp=drawn.logp.gather(1, order)
        )


def measure(config: Config, pairs: int, prompts: int, seed: int) -> dict[str, float]:
    """Shares of pairs whose rewards, and whose texts, differ, with the standard error over
    prompts. Raises ValueError where the rollout's noise is not unclipped Gumbel noise."""
    soft, objective = config.rollout.soft, config.algorithm.objective
    clipped = method_of(soft.noise, objective).noise_clip is not None
    if not soft.enabled or soft.noise != "gumbel" or clipped:
        raise ValueError("pairs need unclipped Gumbel noise: set algorithm.objective=exact")
    model = resolve_model(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    questions = TrainingData(config)
    questions.prepare(tokenizer)
    chosen = questions.prompts_of_round(0, prompts)
    engine = CoupledEngine(model, tokenizer=tokenizer, dtype=config.model.dtype)
    outputs = collect(
        engine,
        [prompt.token_ids for prompt in chosen],
        rollout_uids(0, prompts, 2 * pairs),
        dataclasses.replace(Sampling.of_step(config, config.rollout), seed=seed, stream=PAIRS),
    )
    rewards = RewardRunner(config.reward)
    rewards_S, _ = rewards.score(chosen, outputs)
    rewards.close()
    texts = [[tuple(sample.token_ids) for sample in output.samples] for output in outputs]
    split = torch.tensor([[a != b for a, b in zip(t[::2], t[1::2], strict=True)] for t in texts])
    rewards_NP2 = rewards_S.nan_to_num(0.0).view(prompts, pairs, 2)
    different = (rewards_NP2[..., 0] != rewards_NP2[..., 1]).double().mean(-1)
    return {
        "rewards": float(different.mean()),
        "rewards_error": float(different.std() / prompts**0.5),
        "texts": float(split.double().mean()),
        "mean_reward": float(rewards_NP2.mean()),
        "pairs": float(prompts * pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="demo", help="recipe or file, as softgrpo-train")
    parser.add_argument("--pairs", type=int, default=8, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    config = Config.load(arguments.config, arguments.overrides)
    row = measure(config, arguments.pairs, arguments.prompts, arguments.seed)
    print(
        f"P(R_a != R_b) = {row['rewards']:.3f} +- {1.96 * row['rewards_error']:.3f}, texts differ "
        f"in {row['texts']:.3f} of {row['pairs']:.0f} pairs, mean reward {row['mean_reward']:.3f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
