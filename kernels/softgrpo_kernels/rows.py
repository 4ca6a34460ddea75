"""What goes into the sampling op for every row, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Values of `mode`.
GREEDY, DISCRETE, SOFT, SKIP = range(4)
# Values of `noise`: each method of soft thinking is one of them.
NOISES = ("gumbel", "none", "dirichlet", "gaussian", "multiplex")
GUMBEL, NONE, DIRICHLET, GAUSSIAN, MULTIPLEX = range(5)
ORDERS = ("top_k_first", "joint")

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


@dataclass(frozen=True)
class RowParameters:
    """The parameters of every row. floats: float32 [8, B]; ints: int64 [7, B]; k_max: slots."""

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
    noise = property(lambda self: self.ints[6])

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
        noise: str | Tensor,
    ) -> RowParameters:
        """Broadcasts numbers and [B] tensors into two tables."""
        if not 1 <= k_max <= MAX_CANDIDATES:
            raise ValueError(f"k_max must be 1 to {MAX_CANDIDATES}, not {k_max}")
        low, high = _clamp_bounds(noise_clamp)
        if isinstance(noise, str) and noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, not {noise!r}")
        noise_code = NOISES.index(noise) if isinstance(noise, str) else noise
        floats = torch.empty((8, rows), dtype=torch.float32, device=device)
        ints = torch.empty((7, rows), dtype=torch.int64, device=device)
        for table, values in (
            (floats, (temperature, top_p, min_p, gumbel_tau, noise_scale, low, high, eps)),
            (ints, (top_k, seed, position, uid, stream, mode, noise_code)),
        ):
            for i, value in enumerate(values):
                table[i] = value
        return RowParameters(floats, ints, k_max)

    def check_shape(self, rows: int, device: torch.device) -> None:
        """Raises ValueError unless these are contiguous tables of so many rows on the device."""
        for name, table, dtype, height in (
            ("floats", self.floats, torch.float32, 8),
            ("ints", self.ints, torch.int64, 7),
        ):
            if table.dtype != dtype or table.shape != (height, rows) or not table.is_contiguous():
                raise ValueError(
                    f"rows.{name} must be contiguous {dtype} [{height}, {rows}], not {table.dtype} "
                    f"{list(table.shape)}"
                )
            check_device(f"rows.{name}", table, device)
        if not 1 <= self.k_max <= MAX_CANDIDATES:
            raise ValueError(f"k_max must be 1 to {MAX_CANDIDATES}, not {self.k_max}")

    def check(self) -> None:
        """Raises ValueError for a parameter out of its range; reads the tables: CPU only."""
        if self.mode.numel() and not self._within_all_bounds():
            self._check_each()

    def _within_all_bounds(self) -> bool:
        """True where no row, whatever its mode, can be wrong: one pass over the tables."""
        low, high = (x.tolist() for x in torch.aminmax(self.floats, dim=1))
        fine = low[0] > 0 and low[2] >= 0 and high[2] <= 1 and low[3] > 0
        low, high = (x.tolist() for x in torch.aminmax(self.ints, dim=1))
        fine &= low[0] >= 1 and high[0] <= self.k_max
        fine &= all(x >= 0 for x in low[2:]) and all(x <= 0xFFFFFFFF for x in high[2:5])
        return fine and high[5] <= SKIP and high[6] == GUMBEL

    def _check_each(self) -> None:
        if self.mode.min() < GREEDY or self.mode.max() > SKIP:
            raise ValueError("mode must be 0 (greedy), 1 (discrete), 2 (soft) or 3 (skip)")
        soft, sampled = self.mode == SOFT, (self.mode == SOFT) | (self.mode == DISCRETE)
        unlisted = soft & ~self.listed
        if bool(unlisted.any()):
            raise ValueError(
                f"a soft row needs 1 <= top_k <= k_max = {self.k_max}, not top_k = "
                f"{int(self.top_k[unlisted][0])}"
            )
        if bool((sampled & ~(self.temperature > 0)).any()):
            raise ValueError("temperature must be > 0 in sampled rows (mode 0 is greedy)")
        if bool((soft & ~(self.tau > 0)).any()):
            raise ValueError("gumbel_tau must be > 0 in soft rows")
        if bool((sampled & ~((self.min_p >= 0) & (self.min_p <= 1))).any()):
            raise ValueError("min_p must be in 0 .. 1")
        check_counter_words(self.position, self.uid, self.stream)
        if bool(self.noise.any()):
            self._check_noise(soft)

    def _check_noise(self, soft: Tensor) -> None:
        if self.noise.min() < GUMBEL or self.noise.max() > MULTIPLEX:
            raise ValueError(f"noise must be 0 .. {MULTIPLEX} ({', '.join(NOISES)})")
        several = soft & (self.noise >= DIRICHLET)
        if bool((several & (self.stream >= 1 << 16)).any()):
            raise ValueError("stream must be below 2^16 with dirichlet, gaussian, multiplex noise")
        scale = self.noise_scale
        if bool((soft & (self.noise == DIRICHLET) & ~(scale > 0)).any()):
            raise ValueError("noise_scale, Dirichlet's concentration, must be > 0")
        draws = (scale >= 1) & (scale <= MAX_CANDIDATES) & (scale == scale.round())
        if bool((soft & (self.noise == MULTIPLEX) & ~draws).any()):
            raise ValueError(
                f"noise_scale, the number of draws of multiplex noise, must be 1, 2 .. "
                f"{MAX_CANDIDATES}"
            )


def check_integers(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that does not hold integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, not {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}: move it")


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
