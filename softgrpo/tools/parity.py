"""Engine, trainer and transformers on the same rollout: how far apart are their probabilities?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from softgrpo.algorithm.density import log_densities, mismatch, rollout_logq
from softgrpo.algorithm.positions import DensitySettings, Positions
from softgrpo.config import Config
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.engines import make_engine
from softgrpo.rollout.sampling import (
    ROLLOUT_STREAM,
    Sampling,
    collect,
    density_settings,
    rollout_uids,
)
from softgrpo_engine.model.weights import load_decoder
from softgrpo_kernels import soft_weights
from softgrpo_kernels.reference import soft_embedding as reference

# Largest mean |difference| of a log-probability, nats. float32: rounding of sums of a few hundred
# terms; bfloat16: SmolLM2 has 0.03, and the runs that collapsed had left 0.1 behind.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}


@dataclass(frozen=True)
class Difference:
    """|a - b| over the positions of one kind. where: `soft` or `discrete`; what: `log p` of the
    candidates or the `density`; who: the two that are compared. bound: of the mean; None: none."""

    where: str
    what: str
    who: str
    count: int
    mean: float
    max: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """Whether the mean is a number within the bound."""
        return self.bound is None or self.mean <= self.bound


class _Scores(NamedTuple):
    """What one of the three makes of the positions: log q of the candidates [T, K] over their set,
    and the log-density [T]."""

    logq: Tensor
    density: Tensor


@torch.no_grad()
def compare(
    config: Config, model_path: Path, tokenizer: Any, prompts: Sequence[list[int]]
) -> list[Difference]:
    """Draws ``rollout.group_size`` samples of every prompt and scores their positions thrice.

    The engine's log p is what it drew from, taken off its record; the trainer's is that of a
    policy step; transformers is fed with the recorded mixtures. The model is `model.dtype`, in
    transformers too; its last hidden states meet the LM head in float32, as ours do.
    """
    settings = density_settings(config)
    dtype = getattr(torch, config.model.dtype)
    batch, device = _draw(config, model_path, tokenizer, prompts)
    trainer = Policy(load_decoder(model_path, torch.float32, device), settings, dtype)(batch)
    positions = trainer.positions
    engine_logq = rollout_logq(positions, settings)
    model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=dtype).eval().to(device)
    hf_logq, hf_token = _transformers_logq(model, batch, positions, settings)
    scores = {
        "engine": _Scores(
            engine_logq, log_densities(engine_logq, positions.full_logprobs, positions, settings)
        ),
        "trainer": _Scores(trainer.candidates, trainer.density),
        "HF": _Scores(hf_logq, log_densities(hf_logq, hf_token, positions, settings)),
    }
    rows = []
    for one, other in itertools.combinations(scores, 2):
        who, bound = f"{one}/{other}", BOUNDS[config.model.dtype]
        rows += _differences(who, scores[other], scores[one], positions, settings, bound)
    return rows


def _draw(
    config: Config, model_path: Path, tokenizer: Any, prompts: Sequence[list[int]]
) -> tuple[RolloutBatch, torch.device]:
    """A rollout of the run's engine, and where it was made."""
    rollout = config.rollout
    longest = max(map(len, prompts)) + rollout.max_new_tokens
    samples = len(prompts) * rollout.group_size
    engine = make_engine(config, model_path, tokenizer, longest, samples)
    outputs = collect(
        engine,
        prompts,
        rollout_uids(0, len(prompts), rollout.group_size),
        Sampling.of_step(config, rollout),
    )
    batch = RolloutBatch.from_outputs(
        outputs, seed=config.run.seed, stream=ROLLOUT_STREAM, weight_version=0
    )
    return batch, engine.device


def _differences(
    who: str,
    ours: _Scores,
    theirs: _Scores,
    positions: Positions,
    settings: DensitySettings,
    bound: float,
) -> list[Difference]:
    """The differences of two of the three, by phase; nothing for a phase that no position has."""
    rows, classes = [], positions.classes
    distance_T = (ours.density - theirs.density).abs()
    # The engine's own density may not be on the record.
    if not settings.method.records_density and "engine" in who:
        distance_T = torch.where(classes.soft, torch.nan, distance_T)
    for where, of_phase in (("soft", classes.soft_phase), ("discrete", ~classes.soft_phase)):
        part = dataclasses.replace(classes, listed=of_phase & classes.listed)
        difference_TK, known_TK = mismatch(ours.logq, theirs.logq, part)
        distance = distance_T[of_phase & ~classes.forced]
        found = {
            # A density is a sum over candidates, weighed by g': it has no bound of its own.
            "log p": (difference_TK[known_TK], bound),
            "density": (distance[~distance.isnan()], None if where == "soft" else bound),
        }
        for what, (values, limit) in found.items():
            if len(values):
                mean, largest = float(values.mean()), float(values.max())
                rows.append(Difference(where, what, who, len(values), mean, largest, limit))
    return rows


def _transformers_logq(
    model: Any, batch: RolloutBatch, positions: Positions, settings: DensitySettings
) -> tuple[Tensor, Tensor]:
    """log q of the candidates [T, K] over their set, and log p of the token [T] over the
    vocabulary, by transformers' model."""
    embed_VH = model.get_input_embeddings().weight
    head_VH = model.get_output_embeddings().weight.float()
    device, phase = head_VH.device, positions.classes.soft_phase
    prompts = batch.prompt_ids.long().to(device).split(batch.prompt_lens.tolist())
    weights_TK = soft_weights(positions.gprime, positions.kind, settings.tau, settings.weight_floor)
    noise_TH = None
    if positions.mixtures is not None:
        scaled = positions.mixtures.deviation * positions.mixtures.noise
        noise_TH = scaled.new_zeros(len(positions.token), scaled.shape[1])
        noise_TH[positions.classes.rows.soft] = scaled
    logq, token_logp, start = [], [], 0
    for group, length in zip(batch.group.tolist(), batch.response_lens.tolist(), strict=True):
        rows = slice(start, start + length)
        start += length
        mixtures = reference.soft_embedding(positions.ids[rows], weights_TK[rows], embed_VH)
        if noise_TH is not None:
            mixtures = (mixtures.float() + noise_TH[rows]).to(mixtures.dtype)
        inputs = torch.cat([F.embedding(prompts[group], embed_VH), mixtures])[None, :-1]
        hidden = model.base_model(inputs_embeds=inputs).last_hidden_state[0, -length:]
        temperature = torch.where(
            phase[rows], settings.soft_temperature, settings.discrete_temperature
        )
        logits = hidden.float() @ head_VH.T / temperature[:, None]
        ids = positions.ids[rows].long()
        listed = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        logq.append(listed.log_softmax(-1))
        token_logp.append(logits.log_softmax(-1).gather(1, ids[:, :1])[:, 0])
    return torch.cat(logq), torch.cat(token_logp)
