"""The policy update of one rollout: minibatches, micro-batches, loss, optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo.algorithm.correction import importance_weights
from softgrpo.algorithm.density import log_densities, mismatch, rollout_logq
from softgrpo.algorithm.loss import loss_mask, policy_loss, token_weights
from softgrpo.config.sections import AlgorithmConfig, OptimConfig
from softgrpo.distributed import World, balanced, full
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.policy import Policy, PositionLogProbs
from softgrpo.learner.statistics import Statistics, merged
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine.transfer import to_device


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of a training step (1-based): linear warm-up, then the schedule to 0."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps + 1)
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))


_DIFFERENCE = "sampling/sampling_logp_difference"
_RATIO = "sampling/importance_sampling_ratio"
_LOW, _HIGH = "clip_ratio/low_mean", "clip_ratio/high_mean"


class Update:
    """Turns rollouts with advantages into optimizer steps on the policy."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        algorithm: AlgorithmConfig,
        optim: OptimConfig,
        max_new_tokens: int,
        world: World | None = None,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.world = world or World()
        self.algorithm, self.optim = algorithm, optim
        self.max_new_tokens = max_new_tokens
        self.optimizer = make_optimizer(policy.decoder, optim)

    @property
    def device(self) -> torch.device:
        return self.policy.decoder.embed_weight.device

    def __call__(
        self, batch: RolloutBatch, advantages_S: Tensor, lr: float
    ) -> tuple[dict[str, float], int]:
        """Updates the policy on one rollout.

        advantages_S: float32 [S]. Returns the metrics row and the number of optimizer steps taken:
        a minibatch in which no group has a spread of rewards teaches nothing and takes none.
        Raises FloatingPointError, before the weights change, when a gradient is not finite.
        """
        statistics = Statistics()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        size = self.optim.minibatch_prompts or batch.num_groups
        minibatches = [
            list(range(start, min(start + size, batch.num_groups)))
            for start in range(0, batch.num_groups, size)
        ]
        parts = [self._useful(batch, advantages_S, groups) for groups in minibatches]
        if not any(parts):
            # Nothing to learn from, but the match of rollout and trainer is watched at every step.
            self._densities(batch, list(range(batch.num_groups)), statistics)
            return self._row(statistics, []), 0
        # With one minibatch the sampling policy is the current one: its pass is the update's own.
        useful_groups = [g for groups in parts for g in groups]
        old = None
        if len(minibatches) > 1:
            old = self._densities(batch, useful_groups, statistics)
        norms = [
            self._minibatch(batch, advantages_S, groups, useful, old, statistics)
            for groups, useful in zip(minibatches, parts, strict=True)
            if useful
        ]
        return self._row(statistics, norms), len(norms)

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
        difference, ratio = (summaries.pop(name, None) for name in (_DIFFERENCE, _RATIO))
        if difference:
            row |= {
                f"{_DIFFERENCE}/mean": difference.mean,
                f"{_DIFFERENCE}/max": difference.largest,
            }
        if ratio:
            row |= {
                f"{_RATIO}/min": ratio.smallest,
                f"{_RATIO}/mean": ratio.mean,
                f"{_RATIO}/max": ratio.largest,
            }
        row |= {name: summary.mean for name, summary in summaries.items()}
        if _LOW in row:
            row["clip_ratio/region_mean"] = row[_LOW] + row[_HIGH]
        return row

    def _useful(self, batch: RolloutBatch, advantages_S: Tensor, groups: list[int]) -> list[int]:
        """The groups that have a gradient."""
        if self.reference is not None:
            return groups
        learnt_S = torch.zeros(len(batch.group), dtype=torch.bool)
        learnt_S[batch.sample_of_token[self._mask(batch)]] = True
        useful = set(batch.group[learnt_S & (advantages_S != 0)].tolist())
        return [g for g in groups if g in useful]

    def _mask(self, batch: RolloutBatch) -> Tensor:
        return loss_mask(batch.soft.forced.bool(), batch.is_cut, self.algorithm.mask_truncated)

    def _minibatch(
        self,
        batch: RolloutBatch,
        advantages_S: Tensor,
        groups: list[int],
        useful: list[int],
        old: tuple[Tensor, Tensor] | None,
        statistics: Statistics,
    ) -> float:
        """One optimizer step on the groups; returns the norm of its gradient."""
        # Every group of the minibatch counts in the denominator, also those without spread.
        whole, whole_rows = batch.select_groups(groups)
        weights_T = torch.zeros(len(batch.soft.token))
        weights_T[whole_rows] = token_weights(
            self._mask(whole),
            whole.sample_of_token,
            len(whole.group),
            self.algorithm.loss_aggregation,
            self.max_new_tokens,
        )
        advantages_T = advantages_S[batch.sample_of_token]
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self._micro_batches(batch, useful):
            if not micro:
                self._idle_pass(batch, useful[0])
                continue
            part, rows = batch.select_groups(micro)
            new = self.policy(part)
            if old is None:
                old_T, correction_T = new.density.detach(), self._compare(new, statistics)
            else:
                at = to_device(rows, self.device)
                old_T, correction_T = (values.index_select(0, at) for values in old)
            reference_T = None
            if self.reference is not None:
                with torch.no_grad():
                    reference_T = self.reference(part).density
            result = policy_loss(
                new.density,
                old_T,
                to_device(advantages_T[rows], self.device),
                to_device(weights_T[rows], self.device),
                new.positions.sample,
                new.positions.num_samples,
                self.algorithm,
                correction_T=correction_T,
                reference_T=reference_T,
            )
            # FSDP takes the mean of the processes' gradients; theirs are parts of a sum.
            (result.loss * self.world.size).backward()
            statistics.add("loss", result.loss)
            statistics.add(_LOW, result.clipped_low)
            statistics.add(_HIGH, result.clipped_high)
            if result.kl is not None:
                statistics.add("kl", result.kl)
        norm = full(
            torch.nn.utils.clip_grad_norm_(self.policy.decoder.parameters(), self.optim.grad_clip)
        ).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm}; lower optim.lr or look at the last samples"
            )
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def _densities(
        self, batch: RolloutBatch, groups: list[int], statistics: Statistics
    ) -> tuple[Tensor, Tensor]:
        """Densities under the current policy and importance weights, both [T] (0 outside of the
        groups)."""
        density_T = torch.zeros(len(batch.soft.token), device=self.device)
        correction_T = torch.zeros_like(density_T)
        for micro in self._micro_batches(batch, groups):
            part, rows = batch.select_groups(micro or groups[:1])
            current = self.policy(part)
            if micro:
                at = to_device(rows, self.device)
                correction_T.index_copy_(0, at, self._compare(current, statistics))
                density_T.index_copy_(0, at, current.density)
        return self.world.sum(density_T), self.world.sum(correction_T)

    def _idle_pass(self, batch: RolloutBatch, group: int) -> None:
        """A pass that adds nothing: it takes part in the communication of those that others do,
        in the same order."""
        part, _ = batch.select_groups([group])
        nothing = (self.policy(part).density * 0.0).sum()
        if self.reference is not None:
            with torch.no_grad():
                self.reference(part)
        nothing.backward()

    @torch.no_grad()
    def _compare(self, current: PositionLogProbs, statistics: Statistics) -> Tensor:
        """Records how far the trainer's probabilities are from those that the rollout drew from,
        and returns the importance weights [T]."""
        settings, positions = self.policy.settings, current.positions
        classes = positions.classes
        theirs = rollout_logq(positions, settings)
        statistics.add(_DIFFERENCE, *mismatch(current.candidates, theirs, classes))
        # Drawn from the vocabulary, without candidates: the token alone is compared.
        difference = (current.density - positions.logprobs).abs()
        statistics.add(_DIFFERENCE, difference, classes.full & ~classes.listed)
        behaviour = log_densities(theirs, positions.logprobs, positions, settings)
        known = ~classes.forced
        if not settings.method.keeps_logp:
            known &= ~classes.soft
        log_ratio = torch.where(known, current.density - behaviour, 0.0)
        weights, beyond = importance_weights(
            log_ratio, positions.sample, positions.num_samples, self.algorithm.correction
        )
        statistics.add(_RATIO, log_ratio.exp(), known)
        statistics.add("sampling/beyond_max_ratio", beyond, known)
        logq = current.candidates
        entropy = -torch.where(logq > -torch.inf, logq.exp() * logq, 0.0).sum(-1)
        statistics.add("candidate_entropy", entropy, classes.listed)
        return weights

    def _micro_batches(self, batch: RolloutBatch, groups: list[int]) -> list[list[int]]:
        """The groups of each pass of this process; a group is never split.

        Packed tokens fit the budget and are balanced. All processes have as many passes, some of
        which may be empty.
        """
        lens = batch.prompt_lens.long().index_add(0, batch.group.long(), batch.response_lens.long())
        tokens = [int(lens[g]) for g in groups]
        parts = balanced(tokens, self.optim.tokens_per_microbatch, self.world.size)
        mine = parts[self.world.rank :: self.world.size]
        return [[groups[i] for i in part] for part in mine]
