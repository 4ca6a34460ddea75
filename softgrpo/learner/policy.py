"""The trainable policy: recorded rollouts in, log-densities out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softgrpo.algorithm.positions import DensitySettings, Positions
from softgrpo.learner.packing import PackedInputs
from softgrpo.learner.scoring import PositionLogProbs, mixtures, score, with_mixtures
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.training.group_attention import GroupAttention
from softgrpo_engine.transfer import on_device


class Policy(nn.Module):
    """A decoder with master weights, run in a compute dtype. ``policy(batch)`` scores a rollout.

    The master weights stay in the decoder's dtype (float32); the layers cast them where they use
    them, so that the forward is the engine's and gradients accumulate in the master's precision.
    Of sharded weights a pass sees what FSDP has gathered, in the compute dtype.
    """

    def __init__(
        self, decoder: Decoder, settings: DensitySettings, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.decoder = decoder.train()
        self.settings = settings
        self.dtype = dtype

    def forward(self, batch: RolloutBatch, rewarded_T: Tensor | None = None) -> PositionLogProbs:
        """Scores every response position of a batch under the current weights.

        rewarded_T: bool [T], whether the advantage is above 0, for methods whose gradient differs.

        The prompt of a group is computed once, then all its responses; no [T, V] tensor is made
        for soft positions, and none is kept for discrete ones. Everything that reads a weight
        happens in here, where FSDP has gathered them.
        """
        config = self.decoder.config
        device = self.decoder.embed_weight.device
        # Here a batch goes to the device; all that depends on its values was worked out before.
        positions = on_device(batch.positions(self.settings), device)
        packed = on_device(PackedInputs.of(batch), device)
        master_VH = self.decoder.embed_weight
        positions = with_mixtures(positions, master_VH, self.dtype, self.settings)
        attention = GroupAttention(
            packed.prompt_lens,
            packed.response_lens,
            config.num_heads,
            config.num_kv_heads,
            device,
        )
        hidden_TH = self.decoder(self._embed(packed, positions), packed.positions, attention)
        # The gradient of the head goes straight into the master's: no [V, H] temporary.
        head_VH = self.decoder.lm_head_weight
        return score(
            hidden_TH.index_select(0, packed.predictors),
            head_VH.detach().to(self.dtype),
            positions,
            self.settings,
            rewarded_T=rewarded_T,
            grad_weight=head_VH,
        )

    def _embed(self, packed: PackedInputs, positions: Positions) -> Tensor:
        """Input embeddings [T_in, H].

        Mixtures are detached: their gradient would be that of the sampled noise's path, not of the
        policy. Tokens are ordinary, trainable embeddings.
        """
        master_VH = self.decoder.embed_weight
        embeds = _embedding(packed.token_ids, master_VH).to(self.dtype)
        if not len(packed.mixed):
            return embeds
        mixture = mixtures(
            master_VH.detach().to(self.dtype), positions, packed.mixed_from, self.settings
        )
        return embeds.index_copy(0, packed.mixed, mixture)


def _embedding(ids: Tensor, master_VH: Tensor) -> Tensor:
    """Rows of the master's table. Its gradient holds these rows only and is added into .grad, which
    must then be dense: the optimizer and the norm of the gradient know no other."""

    def make_dense(_: Tensor) -> None:
        if master_VH.grad is None:
            master_VH.grad = torch.zeros_like(master_VH, dtype=master_VH.grad_dtype)

    rows = F.embedding(ids, master_VH, sparse=True)
    if rows.requires_grad:
        rows.register_hook(make_dense)  # then: until the backward pass it takes no memory
    return rows
