"""RolloutBatch: what a rollout hands to the trainer; saved, it replays a training step alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from softgrpo.algorithm.positions import DensitySettings, PositionClasses, Positions, classify
from softgrpo_engine import Output, SoftTokens

FINISH_REASONS = ("stop", "length", "abort")


@dataclass(frozen=True)
class RolloutBatch:
    """S samples in G groups; the T response tokens are packed sample by sample, group by group.

    prompt_ids: int32 [sum of prompt_lens], one prompt per group. prompt_lens: int32 [G].
    group: int32 [S], ascending. response_lens: int32 [S], sums to T. soft: SoftTokens [T, K].
    logprobs: float32 [T], the rollout's log p of ``soft.token``. uid: int64 [S], the noise key.
    finish: uint8 [S], index into FINISH_REASONS. seed, stream: the other noise keys.
    weight_version: int64 [S], version of the weights that drew the sample. kept_mass:
    float32 [T], as in `Sample`, None where it was not asked for.
    """

    prompt_ids: Tensor
    prompt_lens: Tensor
    group: Tensor
    response_lens: Tensor
    soft: SoftTokens
    logprobs: Tensor
    uid: Tensor
    finish: Tensor
    weight_version: Tensor
    seed: int
    stream: int
    kept_mass: Tensor | None = None

    @classmethod
    def from_outputs(
        cls,
        outputs: Sequence[Output],
        *,
        seed: int,
        stream: int,
        weight_version: int | Sequence[int],
    ) -> RolloutBatch:
        """Packs the engine's outputs, one group per output; weight_version: of all or of each."""
        samples = [sample for output in outputs for sample in output.samples]
        records = [sample.soft for sample in samples]
        prompts = [torch.tensor(output.prompt_token_ids, dtype=torch.int32) for output in outputs]
        group = [g for g, output in enumerate(outputs) for _ in output.samples]
        if isinstance(weight_version, int):
            weight_version = [weight_version] * len(outputs)
        masses = [sample.kept_mass for sample in samples if sample.kept_mass is not None]
        return cls(
            prompt_ids=torch.cat(prompts),
            prompt_lens=torch.tensor([len(p) for p in prompts], dtype=torch.int32),
            group=torch.tensor(group, dtype=torch.int32),
            response_lens=torch.tensor([len(r.token) for r in records], dtype=torch.int32),
            soft=SoftTokens(
                **{
                    field.name: torch.cat([getattr(r, field.name) for r in records])
                    for field in fields(SoftTokens)
                }
            ),
            logprobs=torch.cat([sample.logprobs for sample in samples]),
            uid=torch.tensor([sample.uid for sample in samples], dtype=torch.int64),
            finish=torch.tensor(
                [FINISH_REASONS.index(sample.finish_reason) for sample in samples],
                dtype=torch.uint8,
            ),
            weight_version=torch.tensor([weight_version[g] for g in group], dtype=torch.int64),
            seed=seed,
            stream=stream,
            kept_mass=torch.cat(masses) if len(masses) == len(samples) else None,
        )

    @property
    def num_groups(self) -> int:
        return len(self.prompt_lens)

    @property
    def sample_of_token(self) -> Tensor:
        """Sample index of each response token, int64 [T]."""
        return torch.repeat_interleave(torch.arange(len(self.group)), self.response_lens.long())

    @property
    def index_in_response(self) -> Tensor:
        """0-based place of each response token in its response, int64 [T]."""
        lens = self.response_lens.long()
        starts = lens.cumsum(0) - lens
        return torch.arange(int(lens.sum())) - torch.repeat_interleave(starts, lens)

    @property
    def position(self) -> Tensor:
        """Index of each response token in its sequence, prompt included: int64 [T]."""
        prompt_lens = self.prompt_lens.long()[self.group.long()]
        return self.index_in_response + prompt_lens[self.sample_of_token]

    @property
    def is_cut(self) -> Tensor:
        """Whether the length limit cut the response of each token, bool [T]."""
        return (self.finish == FINISH_REASONS.index("length"))[self.sample_of_token]

    def classes(self, settings: DensitySettings) -> PositionClasses:
        """What the response positions are to their density, on the host."""
        return classify(self.soft.kind, self.soft.forced.bool(), self.index_in_response, settings)

    def positions(self, settings: DensitySettings) -> Positions:
        """The response positions, on the host as they are."""
        soft, sample = self.soft, self.sample_of_token
        return Positions(
            ids=soft.ids,
            gprime=soft.gprime,
            kind=soft.kind,
            token=soft.token,
            logprobs=self.logprobs,
            uid=self.uid[sample],
            position=self.position,
            sample=sample,
            classes=self.classes(settings),
            num_samples=len(self.group),
            seed=self.seed,
            stream=self.stream,
            kept_mass=self.kept_mass,
        )

    def select_samples(self, keep: Sequence[int]) -> tuple[RolloutBatch, Tensor]:
        """The batch of some samples (in ascending order) and of their prompts, and the rows [T']
        kept of the T tokens."""
        samples = torch.tensor(sorted(keep), dtype=torch.int64)
        rows = torch.isin(self.sample_of_token, samples).nonzero().squeeze(1)
        groups, group = self.group[samples].long().unique(return_inverse=True)
        prompts = self.prompt_ids.split(self.prompt_lens.tolist())
        return (
            RolloutBatch(
                prompt_ids=torch.cat([prompts[g] for g in groups.tolist()]),
                prompt_lens=self.prompt_lens[groups],
                group=group.int(),
                response_lens=self.response_lens[samples],
                soft=SoftTokens(
                    **{f.name: getattr(self.soft, f.name)[rows] for f in fields(SoftTokens)}
                ),
                logprobs=self.logprobs[rows],
                uid=self.uid[samples],
                finish=self.finish[samples],
                weight_version=self.weight_version[samples],
                seed=self.seed,
                stream=self.stream,
                kept_mass=None if self.kept_mass is None else self.kept_mass[rows],
            ),
            rows,
        )

    def save(self, path: str | Path) -> None:
        """Writes the batch as one safetensors file."""
        tensors = {f"soft.{f.name}": getattr(self.soft, f.name) for f in fields(SoftTokens)}
        numbers = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value
            elif isinstance(value, int):
                numbers[field.name] = value
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, str(path), metadata={"rollout_batch": json.dumps(numbers)})

    @classmethod
    def load(cls, path: str | Path) -> RolloutBatch:
        """Reads what ``save`` wrote."""
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            numbers = json.loads(file.metadata()["rollout_batch"])
        soft = SoftTokens(**{f.name: tensors.pop(f"soft.{f.name}") for f in fields(SoftTokens)})
        return cls(**tensors, soft=soft, **numbers)
