"""Which clip range and which KL estimator each objective bears off policy, on a small task.

    python benchmarks/learning/off_policy.py exact --json exact.json  # off_policy.json: all four

A policy of 4 soft positions with 5 candidates each, a table of logits. The reward is 0 or 1, with
the mean weight of the right candidate as its probability; 64 samples a step in
groups of 8, cut into 8 minibatches that are learnt from one after the other by Adam, so that the
last of them is 7 updates off policy. Half of the seeds choose the learning rate, the others are
reported: reward of the last quarter of the steps, and the largest norm of a gradient in units of
the mean one.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from softgrpo.algorithm.advantages import group_advantages
from softgrpo.algorithm.loss import policy_loss
from softgrpo.config.sections import AlgorithmConfig
from softgrpo_kernels import soft_density

SEEDS, SAMPLES, GROUP, POSITIONS, CANDIDATES, MINIBATCHES, STEPS = 40, 64, 8, 4, 5, 8, 30
TAU, FLOOR = 0.5, 0.1
RATES = (0.06, 0.2, 0.6)
CLIPS = (0.2, 0.4, 0.8, math.inf)
KL_COEF = 0.003


class Table:
    """The policies of all seeds, [SEEDS, POSITIONS, CANDIDATES]; the first candidate is right, and
    improbable at the start."""

    def __init__(self, objective: str) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(SEEDS, POSITIONS, CANDIDATES, generator=generator)
        logits[..., 0] = -1.5
        self.objective = objective
        self.logits = logits.requires_grad_()
        self.reference = logits.detach().clone()

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(g' [SEEDS, SAMPLES, POSITIONS, CANDIDATES], rewards [SEEDS, SAMPLES])."""
        shape = (SEEDS, SAMPLES, POSITIONS, CANDIDATES)
        noise = -torch.empty(shape).exponential_(generator=generator).log()
        gprime = self.logits.detach().log_softmax(-1)[:, None] + noise
        weights = torch.softmax(gprime / TAU, -1)
        weights = torch.where(weights >= FLOOR * weights.amax(-1, keepdim=True), weights, 0.0)
        if self.objective == "discrete":
            weights = (gprime == gprime.amax(-1, keepdim=True)).float()
        weights = weights / weights.sum(-1, keepdim=True)
        chance = weights[..., 0].mean(-1)
        return gprime, (torch.rand(chance.shape, generator=generator) < chance).float()

    def density(self, logits: Tensor, gprime: Tensor) -> Tensor:
        """[SEEDS, samples, POSITIONS], of what the reward saw."""
        logq = logits.log_softmax(-1)[:, None].expand_as(gprime)
        if self.objective == "discrete":
            return logq.gather(-1, gprime.argmax(-1, keepdim=True))[..., 0]
        gprime, order = gprime.sort(-1, descending=True)
        rows = (-1, CANDIDATES)
        floor = {"tau": TAU, "weight_floor": FLOOR} if self.objective == "censored" else {}
        density = soft_density(
            logq.gather(-1, order).reshape(rows), gprime.reshape(rows), objective=self.objective,
            **floor,
        )  # fmt: skip
        return density.view(gprime.shape[:-1])


def learn(objective: str, rate: float, clip: float, kl: str | None) -> tuple[Tensor, Tensor, float]:
    """(reward of every seed at the end, largest over mean norm of its gradients [SEEDS], share of
    terms that were clipped)."""
    table, generator = Table(objective), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam([table.logits], lr=rate)
    groups = torch.arange(SEEDS * SAMPLES) // GROUP
    algorithm = AlgorithmConfig(
        clip_low=min(clip, 1.0), clip_high=clip, kl_coef=KL_COEF, kl_estimator=kl or "k3"
    )
    rewards, norms, clipped = [], [], []
    for _ in range(STEPS):
        gprime, reward = table.draw(generator)
        rewards.append(reward.mean(1))
        advantages = group_advantages(reward.flatten(), groups, "grpo").view(SEEDS, SAMPLES)
        with torch.no_grad():
            old = table.density(table.logits, gprime)
            reference = table.density(table.reference, gprime)
        for part in torch.arange(SAMPLES).split(SAMPLES // MINIBATCHES):
            new = table.density(table.logits, gprime[:, part])
            size = new.numel()
            loss = policy_loss(
                new.flatten(),
                old[:, part].flatten(),
                advantages[:, part, None].expand_as(new).flatten(),
                torch.full((size,), SEEDS / size),
                torch.zeros(size, dtype=torch.int64),
                1,
                algorithm,
                reference_T=reference[:, part].flatten() if kl else None,
            )
            adam.zero_grad()
            loss.loss.backward()
            norms.append(table.logits.grad.flatten(1).norm(dim=1))
            adam.step()
            clipped.append((loss.clipped_low | loss.clipped_high).float().mean())
    spike = torch.stack(norms)
    spike = spike.amax(0) / spike.mean(0)
    last = torch.stack(rewards)[-STEPS // 4 :].mean(0)
    return last, spike, torch.stack(clipped).mean().item()


def tuned(objective: str, clip: float, kl: str | None) -> dict[str, object]:
    """The row of an objective at its best learning rate."""
    half = SEEDS // 2
    runs = {rate: learn(objective, rate, clip, kl) for rate in RATES}
    rate = max(RATES, key=lambda rate: runs[rate][0][:half].mean().nan_to_num(-1).item())
    reward, spike, clipped = runs[rate]
    reward = reward[half:]
    return {
        "objective": objective,
        "clip": clip if math.isfinite(clip) else None,
        "kl": kl,
        "lr": rate,
        "reward": round(reward.mean().item(), 3),
        "interval": round(1.96 * reward.std().item() / math.sqrt(half), 3),
        "spike": round(spike.median().item(), 1),
        "clipped": round(clipped, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objective", choices=["discrete", "censored", "concrete", "exact"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = [(clip, None) for clip in CLIPS] + [(0.2, kl) for kl in ("k1", "k3")]
    rows = []
    for clip, kl in cases:
        rows.append(tuned(arguments.objective, clip, kl))
        print(rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
