"""What one soft step returns, and the LM head that it may start from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_device


@dataclass(frozen=True)
class SoftToken:
    """One sampled position per row; slots are ordered by (g' descending, token id ascending).

    B rows, K = k_max slots. float32 (float64 where the logits are).

    Attributes:
        ids: int32 [B, K], candidate token ids; unused slots -1.
        gprime: [B, K], log p + noise; unused slots -inf.
        weights: [B, K], of the mixture: softmax(g'/tau), one-hot on slot 0 where kind is 0;
            unused slots 0.
        logp: [B, K], log p before the noise; unused slots -inf.
        n: int32 [B], slots in use.
        token: int32 [B], ``ids[:, 0]``; -1 in skipped and invalid rows.
        token_logp: [B], log p of the token under the distribution it was sampled from; -inf in
            skipped and invalid rows.
        kind: uint8 [B], 1 soft, 0 discrete.
        embed: [B, H] in the table's dtype, the mixture of embeddings (zeros in skipped and invalid
            rows), or None where no table was given.
        lse: [B], logsumexp of logits / temperature over the vocabulary (temperature 1 in greedy
            rows; NaN in skipped and invalid ones), or None where it was not asked for.
        entropy: [B], of the softmax of the same, in nats, or None.
        valid: bool [B], False where the logits hold NaN or +inf or nothing finite, and, on a
            device, where a parameter of the row is out of its range: to look at it on the host
            would wait. (On the CPU such a row is a ValueError.) Such a row holds what a skipped one
            holds, token -1: never a token that nobody asked for. Skipped rows are valid.
    """

    ids: Tensor
    gprime: Tensor
    weights: Tensor
    logp: Tensor
    n: Tensor
    token: Tensor
    token_logp: Tensor
    kind: Tensor
    embed: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    valid: Tensor

    @staticmethod
    def layout(
        source: Tensor, k_max: int, embed: Tensor | None, need_lse: bool, need_entropy: bool
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]] | None]:
        """(dtype, shape) of every field for these logits [B, V] or hidden states [B, H]; None
        where it is not wanted."""
        rows = source.shape[0]
        wide = torch.float64 if source.dtype == torch.float64 else torch.float32
        return {
            "ids": (torch.int32, (rows, k_max)),
            "gprime": (wide, (rows, k_max)),
            "weights": (wide, (rows, k_max)),
            "logp": (wide, (rows, k_max)),
            "n": (torch.int32, (rows,)),
            "token": (torch.int32, (rows,)),
            "token_logp": (wide, (rows,)),
            "kind": (torch.uint8, (rows,)),
            "embed": None if embed is None else (embed.dtype, (rows, embed.shape[1])),
            "lse": (wide, (rows,)) if need_lse else None,
            "entropy": (wide, (rows,)) if need_entropy else None,
            "valid": (torch.bool, (rows,)),
        }

    def check_room(
        self,
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]] | None],
        device: torch.device,
    ) -> None:
        """Raises ValueError where these tensors cannot hold a result of this layout."""
        for name, want in layout.items():
            have = getattr(self, name)
            if have is None or want is None:
                if (have is None) != (want is None):
                    raise ValueError(f"out.{name} is {'missing' if have is None else 'not asked'}")
                continue
            if (have.dtype, tuple(have.shape)) != want or not have.is_contiguous():
                raise ValueError(
                    f"out.{name} must be contiguous {want[0]} {list(want[1])}, not {have.dtype} "
                    f"{list(have.shape)}"
                )
            check_device(f"out.{name}", have, device)

    def fill_padding(self) -> None:
        """What skipped rows hold."""
        self.ids.fill_(-1)
        self.gprime.fill_(-torch.inf)
        self.weights.zero_()
        self.logp.fill_(-torch.inf)
        self.n.zero_()
        self.token.fill_(-1)
        self.token_logp.fill_(-torch.inf)
        self.kind.zero_()
        self.valid.fill_(True)
        if self.embed is not None:
            self.embed.zero_()
        for statistic in (self.lse, self.entropy):
            if statistic is not None:
                statistic.fill_(torch.nan)


# In the order in which the ops take them.
OUTPUTS = tuple(field.name for field in fields(SoftToken))


@dataclass(frozen=True)
class LMHead:
    """Where the logits come from: z = cap(logit_scale (W x + bias)), cap(z) = softcap
    tanh(z / softcap) or nothing.

    hidden: [B, H]; weight: [V, H] in the same dtype; bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self) -> Tensor:
        """All logits [B, V] in the dtype of the hidden states."""
        return self._mapped(torch.nn.functional.linear(self.hidden, self.weight, self.bias))

    def logits_of(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits of tokens [B, K], multiplied and added in this dtype."""
        z_BK = (self.hidden[:, None].to(dtype) * self.weight[ids].to(dtype)).sum(-1)
        return self._mapped(z_BK if self.bias is None else z_BK + self.bias[ids].to(dtype))

    def _mapped(self, z: Tensor) -> Tensor:
        if self.logit_scale != 1.0:
            z = z * self.logit_scale
        if self.softcap is None:
            return z
        return torch.tanh(z / self.softcap) * self.softcap
