"""The policy update of one rollout: minibatches, each a gradient and an optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import AdamWConfig, Sections
from softgrpo.distributed import World
from softgrpo.learner.lora import WithoutAdapters
from softgrpo.learner.passes import CLIP_HIGH, CLIP_LOW, DIFFERENCE, RATIO, Passes
from softgrpo.learner.policy import Policy
from softgrpo.learner.sharding import full
from softgrpo.learner.statistics import Statistics, merged
from softgrpo.rollout.batch import RolloutBatch


def learning_rate(config: AdamWConfig, step: int, max_steps: int) -> float:
    """Learning rate of a training step (1-based): linear warm-up, then the schedule to 0."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps + 1)
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))


class Update:
    """Turns rollouts with advantages into optimizer steps on the policy.

    reference: the frozen policy that a KL is taken to, if any.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | WithoutAdapters | None,
        optimizer: torch.optim.Optimizer,
        world: World | None = None,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.optimizer = optimizer
        self.world = world or World()

    def score_by(self, settings: DensitySettings) -> None:
        """Scores the rollouts to come as those settings say."""
        self.policy.settings = settings
        if isinstance(self.reference, Policy):
            self.reference.settings = settings

    def __call__(
        self, batch: RolloutBatch, advantages_S: Tensor, lr: float, config: Sections
    ) -> tuple[dict[str, float], int]:
        """Updates the policy on one rollout, as `algorithm` and `optim` of the configuration say.

        advantages_S: float32 [S]. Returns the metrics row and the number of optimizer steps taken:
        a minibatch in which no sample has an advantage teaches nothing and takes none.
        Raises FloatingPointError, before the weights change, when a gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        passes = Passes(self.policy, self.reference, batch, config, self.world)
        useful = passes.useful_samples(advantages_S)
        if not useful:
            # Nothing to learn from, but the match of rollout and trainer is watched at every step.
            passes.densities(list(range(len(batch.group))))
            return self._row(passes.statistics, []), 0
        minibatch_S = batch.group // (config.optim.minibatch_prompts or batch.num_groups)
        count = int(minibatch_S.max()) + 1
        # With one minibatch the sampling policy is the current one: its pass is the update's own.
        old = passes.densities(useful) if count > 1 else None
        norms = []
        for number in range(count):
            samples = (minibatch_S == number).nonzero().flatten().tolist()
            learnt = sorted(set(samples) & set(useful))
            if learnt:
                self.optimizer.zero_grad(set_to_none=True)
                passes.backward(samples, learnt, advantages_S, old)
                norms.append(self._step(config.optim.grad_clip))
        return self._row(passes.statistics, norms), len(norms)

    def _step(self, grad_clip: float) -> float:
        """One optimizer step; returns the norm of the gradient before it is clipped."""
        parameters = self.policy.decoder.parameters()
        norm = full(torch.nn.utils.clip_grad_norm_(parameters, grad_clip)).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm}; lower optim.lr or look at the last samples"
            )
        self.optimizer.step()
        return norm

    def _row(self, statistics: Statistics, norms: list[float]) -> dict[str, float]:
        """Of all processes together: each has a part of every loss, and all have the same gradient.
        A number that this kind of rollout does not have leaves no name in the row."""
        summaries = merged(self.world.gather(statistics.summaries()))
        updates = max(1, len(norms))
        loss = summaries.pop("loss", None)
        row = {
            "loss": loss.total / updates if loss else 0.0,
            "grad_norm": sum(norms) / updates,
        }
        difference, ratio = (summaries.pop(name, None) for name in (DIFFERENCE, RATIO))
        if difference:
            row |= {
                f"{DIFFERENCE}/mean": difference.mean,
                f"{DIFFERENCE}/max": difference.largest,
            }
        if ratio:
            row |= {
                f"{RATIO}/min": ratio.smallest,
                f"{RATIO}/mean": ratio.mean,
                f"{RATIO}/max": ratio.largest,
            }
        row |= {name: summary.mean for name, summary in summaries.items()}
        if CLIP_LOW in row:
            row["clip_ratio/region_mean"] = row[CLIP_LOW] + row[CLIP_HIGH]
        return row
