"""What goes into the sampling op for every row, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Values of `mode`.
GREEDY, DISCRETE, SOFT, SKIP = range(4)

MAX_CANDIDATES = 64

Number = float | Tensor
Clamp = tuple[float, float] | Tensor | None


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
        valid: bool [B], False where the logits hold NaN or +inf or nothing finite.
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
    def padding(
        rows: int, k_max: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> SoftToken:
        """All rows skipped: what a row holds until something is sampled."""
        return SoftToken(
            ids=torch.full((rows, k_max), -1, dtype=torch.int32, device=device),
            gprime=torch.full((rows, k_max), -torch.inf, dtype=dtype, device=device),
            weights=torch.zeros((rows, k_max), dtype=dtype, device=device),
            logp=torch.full((rows, k_max), -torch.inf, dtype=dtype, device=device),
            n=torch.zeros(rows, dtype=torch.int32, device=device),
            token=torch.full((rows,), -1, dtype=torch.int32, device=device),
            token_logp=torch.full((rows,), -torch.inf, dtype=dtype, device=device),
            kind=torch.zeros(rows, dtype=torch.uint8, device=device),
            embed=None,
            lse=None,
            entropy=None,
            valid=torch.ones(rows, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True)
class RowParameters:
    """The parameters of every row. floats: float32 [8, B]; ints: int64 [6, B]; k_max: slots."""

    floats: Tensor
    ints: Tensor
    k_max: int

    temperature = property(lambda self: self.floats[0])
    top_p = property(lambda self: self.floats[1])
    min_p = property(lambda self: self.floats[2])
    tau = property(lambda self: self.floats[3])
    noise_scale = property(lambda self: self.floats[4])
    clamp_low = property(lambda self: self.floats[5])
    clamp_high = property(lambda self: self.floats[6])
    eps = property(lambda self: self.floats[7])
    top_k = property(lambda self: self.ints[0])
    seed = property(lambda self: self.ints[1])
    position = property(lambda self: self.ints[2])
    uid = property(lambda self: self.ints[3])
    stream = property(lambda self: self.ints[4])
    mode = property(lambda self: self.ints[5])

    @property
    def listed(self) -> Tensor:
        """bool [B]: sampled rows whose candidates fit into the slots."""
        sampled = (self.mode == DISCRETE) | (self.mode == SOFT)
        return sampled & (self.top_k >= 1) & (self.top_k <= self.k_max)

    @property
    def unlisted(self) -> Tensor:
        """bool [B]: discrete rows whose set may be larger than the slots."""
        return (self.mode == DISCRETE) & ~self.listed

    @staticmethod
    def pack(
        rows: int,
        device: torch.device,
        k_max: int,
        *,
        temperature: Number,
        top_k: int | Tensor,
        top_p: Number,
        min_p: Number,
        gumbel_tau: Number,
        noise_scale: Number,
        noise_clamp: Clamp,
        eps: Number,
        seed: int | Tensor,
        position: int | Tensor,
        uid: int | Tensor,
        stream: int | Tensor,
        mode: int | Tensor,
    ) -> RowParameters:
        """Broadcasts numbers and [B] tensors into two tables; checks them where that is cheap."""
        if not 1 <= k_max <= MAX_CANDIDATES:
            raise ValueError(f"k_max must be 1 to {MAX_CANDIDATES}, not {k_max}")
        low, high = _clamp_bounds(noise_clamp)
        floats = torch.empty((8, rows), dtype=torch.float32, device=device)
        ints = torch.empty((6, rows), dtype=torch.int64, device=device)
        for table, values in (
            (floats, (temperature, top_p, min_p, gumbel_tau, noise_scale, low, high, eps)),
            (ints, (top_k, seed, position, uid, stream, mode)),
        ):
            for i, value in enumerate(values):
                table[i] = value
        packed = RowParameters(floats, ints, k_max)
        # On a device the check would wait for it; the rows there are checked by their producer.
        if device.type == "cpu" and rows:
            packed._check()
        return packed

    def _check(self) -> None:
        if self.ints[5].min() < GREEDY or self.ints[5].max() > SKIP:
            raise ValueError("mode must be 0 (greedy), 1 (discrete), 2 (soft) or 3 (skip)")
        soft, sampled = self.mode == SOFT, (self.mode == SOFT) | (self.mode == DISCRETE)
        if bool((soft & ~self.listed).any()):
            worst = self.top_k[soft & ~self.listed][0]
            raise ValueError(
                f"a soft row needs 1 <= top_k <= k_max = {self.k_max}, not top_k = {int(worst)}"
            )
        if bool((sampled & ~(self.floats[0] > 0)).any()):
            raise ValueError("temperature must be > 0 in sampled rows (mode 0 is greedy)")
        if bool((soft & ~(self.floats[3] > 0)).any()):
            raise ValueError("gumbel_tau must be > 0 in soft rows")
        if bool((sampled & ~((self.floats[2] >= 0) & (self.floats[2] <= 1))).any()):
            raise ValueError("min_p must be in 0 .. 1")
        check_counter_words(self.position, self.uid, self.stream)


def check_counter_words(position: Tensor, uid: Tensor, stream: Tensor) -> None:
    """The counter of the noise has 32 bits for each of these.

    Raises:
        ValueError: one of them is outside 0 .. 2^32 - 1.
    """
    for name, value in (("position", position), ("uid", uid), ("stream", stream)):
        if value.numel() and (value.min() < 0 or value.max() > 0xFFFFFFFF):
            raise ValueError(f"{name} must be in 0 .. 2^32 - 1 (take it modulo 2^32)")


def _clamp_bounds(noise_clamp: Clamp) -> tuple[Number, Number]:
    if noise_clamp is None:
        return -torch.inf, torch.inf
    if isinstance(noise_clamp, Tensor):
        if noise_clamp.dim() != 2 or noise_clamp.shape[1] != 2:
            raise ValueError(f"noise_clamp must be [B, 2], not {list(noise_clamp.shape)}")
        return noise_clamp[:, 0], noise_clamp[:, 1]
    return noise_clamp
