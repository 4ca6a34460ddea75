"""The passes of one update: densities, and the gradient of a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softgrpo.algorithm.correction import importance_weights
from softgrpo.algorithm.density import behaviour_densities, mismatch, rollout_logq
from softgrpo.algorithm.loss import (
    bounded_exp,
    kl_estimator,
    loss_mask,
    policy_loss,
    token_weights,
)
from softgrpo.config.sections import Sections
from softgrpo.distributed import World
from softgrpo.learner.lora import WithoutAdapters
from softgrpo.learner.microbatches import microbatches
from softgrpo.learner.policy import Policy
from softgrpo.learner.scoring import PositionLogProbs, entropy_of
from softgrpo.learner.statistics import Statistics
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine.transfer import to_device

# Names of statistics.
DIFFERENCE = "sampling/sampling_logp_difference"
RATIO = "sampling/importance_sampling_ratio"
CLIP_LOW, CLIP_HIGH = "clip_ratio/low_mean", "clip_ratio/high_mean"


class Passes:
    """The passes of the policies over one rollout, each process on its part of the samples.

    statistics: the numbers of this process's passes so far.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | WithoutAdapters | None,
        batch: RolloutBatch,
        config: Sections,
        world: World,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.batch, self.config, self.world = batch, config, world
        self.statistics = Statistics()
        heavy_tailed = policy.settings.soft_enabled and policy.settings.method.heavy_tailed
        estimator = kl_estimator(config.algorithm.kl_estimator, heavy_tailed)
        self.algorithm = replace(config.algorithm, kl_estimator=estimator)
        self.sample_T = batch.sample_of_token
        self.mask_T = loss_mask(
            batch.classes(policy.settings).forced, batch.is_cut, config.algorithm.mask_truncated
        )

    @property
    def device(self) -> torch.device:
        return self.policy.decoder.embed_weight.device

    def useful_samples(self, advantages_S: Tensor) -> list[int]:
        """The samples that have a gradient, ascending."""
        useful_S = torch.zeros(len(self.batch.group), dtype=torch.bool)
        useful_S[self.sample_T[self.mask_T]] = True
        if self.reference is None:
            useful_S &= advantages_S != 0
        return useful_S.nonzero().flatten().tolist()

    @torch.no_grad()
    def densities(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What has a ratio of its own, under the current policy [T, C], and importance weights [T]
        (0 outside of the samples)."""
        columns = self.batch.soft.ids.shape[1] if self.policy.settings.method.per_slot else 1
        terms_TC = torch.zeros(len(self.sample_T), columns, device=self.device)
        correction_T = torch.zeros(len(self.sample_T), device=self.device)
        for micro in self._microbatches(samples):
            part, rows = self.batch.select_samples(micro or [self._shortest(samples)])
            current = self.policy(part)
            if micro:
                at = to_device(rows, self.device)
                correction_T.index_copy_(0, at, self._compare(current))
                terms_TC.index_copy_(0, at, current.terms)
        return self.world.sum(terms_TC), self.world.sum(correction_T)

    def backward(
        self,
        minibatch: Sequence[int],
        useful: Sequence[int],
        advantages_S: Tensor,
        old: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Adds the gradient of a minibatch's loss to that of the parameters.

        minibatch: its samples. useful: those of them that have a gradient, at least one; the loss
        is a mean over all. old: `densities` of the policy that sampled; None: of the current one.
        """
        advantages_T, weights_T = advantages_S[self.sample_T], self._weights(minibatch)
        for micro in self._microbatches(useful):
            if not micro:
                self._idle_pass(self._shortest(useful))
                continue
            part, rows = self.batch.select_samples(micro)
            loss = self._loss(part, rows, advantages_T[rows], weights_T[rows], old)
            # FSDP takes the mean of the processes' gradients; theirs are parts of a sum.
            (loss * self.world.size).backward()

    def _weights(self, minibatch: Sequence[int]) -> Tensor:
        """Weights [T] of the tokens in the loss of a minibatch, 0 outside of it.

        Every sample of the minibatch counts in the denominator, also those without an advantage.
        """
        samples = torch.tensor(minibatch)
        rows = torch.isin(self.sample_T, samples).nonzero().flatten()
        weights_T = torch.zeros(len(self.sample_T))
        weights_T[rows] = token_weights(
            self.mask_T[rows],
            torch.searchsorted(samples, self.sample_T[rows]),
            len(samples),
            self.config.algorithm.loss_aggregation,
            self.config.rollout.max_new_tokens,
        )
        return weights_T

    def _loss(
        self,
        part: RolloutBatch,
        rows: Tensor,
        advantages_T: Tensor,
        weights_T: Tensor,
        old: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The loss of some samples. rows: int64 [T], their tokens among those of the rollout;
        advantages_T, weights_T: float32 [T], of them."""
        advantages_T, weights_T = (to_device(x, self.device) for x in (advantages_T, weights_T))
        new = self.policy(part, rewarded_T=advantages_T > 0)
        if old is None:
            old_TC, correction_T = new.terms.detach(), self._compare(new)
        else:
            at = to_device(rows, self.device)
            old_TC, correction_T = (values.index_select(0, at) for values in old)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(part).terms.flatten()

        def of_terms(values_T: Tensor) -> Tensor:
            """What a position has, for each of its terms."""
            return values_T[:, None].expand_as(new.terms).flatten()

        result = policy_loss(
            new.terms.flatten(),
            old_TC.flatten(),
            of_terms(advantages_T),
            of_terms(weights_T) * new.counts.flatten(),
            of_terms(new.positions.sample),
            new.positions.num_samples,
            self.algorithm,
            correction_T=of_terms(correction_T),
            reference_T=reference,
        )
        counted = new.counts.flatten() > 0
        self.statistics.add("loss", result.loss)
        self.statistics.add(CLIP_LOW, result.clipped_low, counted)
        self.statistics.add(CLIP_HIGH, result.clipped_high, counted)
        if result.kl is not None:
            kl_T = (result.kl.view_as(new.counts) * new.counts).sum(-1)
            self.statistics.add("kl", kl_T, weights_T > 0)
        return result.loss

    def _idle_pass(self, sample: int) -> None:
        """A pass that adds nothing: it takes part in the communication of those that others do,
        in the same order."""
        part, _ = self.batch.select_samples([sample])
        nothing = (self.policy(part).density * 0.0).sum()
        if self.reference is not None:
            with torch.no_grad():
                self.reference(part)
        nothing.backward()

    @torch.no_grad()
    def _compare(self, current: PositionLogProbs) -> Tensor:
        """Records how far the trainer's probabilities are from those that the rollout drew from,
        and returns the importance weights [T]."""
        settings, positions = self.policy.settings, current.positions
        classes, statistics = positions.classes, self.statistics
        theirs = rollout_logq(positions, settings)
        statistics.add(DIFFERENCE, *mismatch(current.candidates, theirs, classes))
        # Drawn from the vocabulary, without candidates: the token alone is compared.
        difference = (current.density - positions.full_logprobs).abs()
        statistics.add(DIFFERENCE, difference, classes.full & ~classes.listed)
        behaviour, known = behaviour_densities(theirs, positions, settings)
        log_ratio = torch.where(known, current.density - behaviour, 0.0)
        weights, beyond = importance_weights(
            log_ratio, positions.sample, positions.num_samples, self.config.algorithm.correction
        )
        statistics.add(RATIO, bounded_exp(log_ratio), known)
        statistics.add("sampling/beyond_max_ratio", beyond, known)
        statistics.add("candidate_entropy", entropy_of(current.candidates), classes.listed)
        return weights

    def _microbatches(self, samples: Sequence[int]) -> list[list[int]]:
        budget = self.config.optim.tokens_per_microbatch
        return microbatches(self.batch, samples, budget, self.world)

    def _shortest(self, samples: Sequence[int]) -> int:
        """What an idle pass takes: it should end before those that others wait for."""
        return samples[int(self.batch.response_lens[samples].argmin())]
