"""The policy update of one rollout: minibatches, micro-batches, loss, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softgrpo.batch import RolloutBatch
from softgrpo.config import AlgorithmConfig, OptimConfig
from softgrpo.correction import importance_weights
from softgrpo.density import log_densities, mismatch, rollout_logq
from softgrpo.distributed import World, balanced, full
from softgrpo.loss import loss_mask, policy_loss, token_weights
from softgrpo.optimizer import make_optimizer
from softgrpo.policy import Policy, PositionLogProbs


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


@dataclass
class _Statistics:
    """What the passes of one step leave for its metrics row."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    clipped_low: list[Tensor] = field(default_factory=list)
    clipped_high: list[Tensor] = field(default_factory=list)
    mismatch: list[Tensor] = field(default_factory=list)
    ratio_to_rollout: list[Tensor] = field(default_factory=list)
    beyond_max: list[Tensor] = field(default_factory=list)
    candidate_entropy: list[Tensor] = field(default_factory=list)

    @staticmethod
    def merged(parts: Sequence[_Statistics]) -> _Statistics:
        """Those of all processes: each has a part of every loss, and all have the same gradient."""
        whole = _Statistics()
        for part in parts:
            for name, values in vars(part).items():
                getattr(whole, name).extend(values)
        whole.losses = [sum(losses) for losses in zip(*(p.losses for p in parts), strict=True)]
        whole.grad_norms = parts[0].grad_norms
        return whole

    def row(self) -> dict[str, float]:
        row = {
            "loss": sum(self.losses) / max(1, len(self.losses)),
            "grad_norm": sum(self.grad_norms) / max(1, len(self.grad_norms)),
        }
        # A number that this kind of rollout does not have leaves no name in the row.
        difference, ratio = _joined(self.mismatch), _joined(self.ratio_to_rollout)
        if len(difference):
            row["sampling/sampling_logp_difference/mean"] = float(difference.mean())
            row["sampling/sampling_logp_difference/max"] = float(difference.max())
        if len(ratio):
            row["sampling/importance_sampling_ratio/min"] = float(ratio.min())
            row["sampling/importance_sampling_ratio/mean"] = float(ratio.mean())
            row["sampling/importance_sampling_ratio/max"] = float(ratio.max())
        for name, parts in (
            ("sampling/beyond_max_ratio", self.beyond_max),
            ("candidate_entropy", self.candidate_entropy),
            ("clip_ratio/low_mean", self.clipped_low),
            ("clip_ratio/high_mean", self.clipped_high),
            ("kl", self.kl),
        ):
            if len(values := _joined(parts)):
                row[name] = float(values.float().mean())
        if self.clipped_low:
            row["clip_ratio/region_mean"] = row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"]
        return row


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0)


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

    def __call__(
        self, batch: RolloutBatch, advantages_S: Tensor, lr: float
    ) -> tuple[dict[str, float], int]:
        """Updates the policy on one rollout.

        advantages_S: float32 [S]. Returns the metrics row and the number of optimizer steps taken:
        a minibatch in which no group has a spread of rewards teaches nothing and takes none.
        Raises FloatingPointError, before the weights change, when a gradient is not finite.
        """
        statistics = _Statistics()
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
            return self._row(statistics), 0
        # With one minibatch the sampling policy is the current one: its pass is the update's own.
        useful_groups = [g for groups in parts for g in groups]
        old = None
        if len(minibatches) > 1:
            old = self._densities(batch, useful_groups, statistics)
        taken = 0
        for groups, useful in zip(minibatches, parts, strict=True):
            if useful:
                self._minibatch(batch, advantages_S, groups, useful, old, statistics)
                taken += 1
        return self._row(statistics), taken

    def _row(self, statistics: _Statistics) -> dict[str, float]:
        return _Statistics.merged(self.world.gather(statistics)).row()

    def _useful(self, batch: RolloutBatch, advantages_S: Tensor, groups: list[int]) -> list[int]:
        """The groups that have a gradient."""
        if self.reference is not None:
            return groups
        learnt_S = torch.zeros(len(batch.group), dtype=torch.bool)
        learnt_S[batch.sample_of_token[loss_mask(batch, self.algorithm.mask_truncated)]] = True
        useful = set(batch.group[learnt_S & (advantages_S != 0)].tolist())
        return [g for g in groups if g in useful]

    def _minibatch(
        self,
        batch: RolloutBatch,
        advantages_S: Tensor,
        groups: list[int],
        useful: list[int],
        old: tuple[Tensor, Tensor] | None,
        statistics: _Statistics,
    ) -> None:
        # Every group of the minibatch counts in the denominator, also those without spread.
        whole, whole_rows = batch.select_groups(groups)
        weights_T = torch.zeros(len(batch.soft.token))
        weights_T[whole_rows] = token_weights(
            whole,
            loss_mask(whole, self.algorithm.mask_truncated),
            self.algorithm.loss_aggregation,
            self.max_new_tokens,
        )
        advantages_T = advantages_S[batch.sample_of_token]
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in self._micro_batches(batch, useful):
            if not micro:
                self._idle_pass(batch, useful[0])
                continue
            part, rows = batch.select_groups(micro)
            new = self.policy(part)
            if old is None:
                old_T, correction_T = new.density.detach(), self._compare(part, new, statistics)
            else:
                old_T, correction_T = old[0][rows], old[1][rows]
            reference_T = None
            if self.reference is not None:
                with torch.no_grad():
                    reference_T = self.reference(part).density
            result = policy_loss(
                new.density,
                old_T,
                advantages_T[rows],
                weights_T[rows],
                part.sample_of_token,
                self.algorithm,
                correction_T=correction_T,
                reference_T=reference_T,
            )
            # FSDP takes the mean of the processes' gradients; theirs are parts of a sum.
            (result.loss * self.world.size).backward()
            total += result.loss.item()
            statistics.clipped_low.append(result.clipped_low)
            statistics.clipped_high.append(result.clipped_high)
            if result.kl is not None:
                statistics.kl.append(result.kl)
        norm = full(
            torch.nn.utils.clip_grad_norm_(self.policy.decoder.parameters(), self.optim.grad_clip)
        )
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the gradient norm is {norm.item()}; lower optim.lr or look at the last samples"
            )
        self.optimizer.step()
        statistics.losses.append(total)
        statistics.grad_norms.append(norm.item())

    @torch.no_grad()
    def _densities(
        self, batch: RolloutBatch, groups: list[int], statistics: _Statistics
    ) -> tuple[Tensor, Tensor]:
        """Densities under the current policy and importance weights, both [T] (0 outside of the
        groups)."""
        density_T = torch.zeros(len(batch.soft.token))
        correction_T = torch.zeros(len(batch.soft.token))
        for micro in self._micro_batches(batch, groups):
            part, rows = batch.select_groups(micro or groups[:1])
            current = self.policy(part)
            if micro:
                correction_T[rows] = self._compare(part, current, statistics)
                density_T[rows] = current.density
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
    def _compare(
        self, part: RolloutBatch, current: PositionLogProbs, statistics: _Statistics
    ) -> Tensor:
        """Records how far the trainer's probabilities are from those that the rollout drew from,
        and returns the importance weights [T]."""
        settings, classes = self.policy.settings, current.classes
        theirs = rollout_logq(part, classes, settings)
        statistics.mismatch.append(mismatch(current.candidates, theirs, classes))
        # Drawn from the vocabulary, without candidates: the token alone is compared.
        unlisted = classes.full & ~classes.listed
        statistics.mismatch.append((current.density - part.logprobs)[unlisted].abs())
        behaviour = log_densities(theirs, part.logprobs, part, classes, settings)
        known = ~classes.forced
        if settings.noise != "gumbel":
            known &= ~classes.soft
        log_ratio = torch.where(known, current.density - behaviour, 0.0)
        weights, beyond = importance_weights(
            log_ratio, part.sample_of_token, self.algorithm.correction
        )
        statistics.ratio_to_rollout.append(log_ratio[known].exp())
        statistics.beyond_max.append(beyond[known])
        logq = current.candidates[classes.listed]
        entropy = -torch.where(logq > -torch.inf, logq.exp() * logq, 0.0).sum(-1)
        statistics.candidate_entropy.append(entropy)
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
