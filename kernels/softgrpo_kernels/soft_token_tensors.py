"""The tensors that one soft step takes, beside the parameters of its rows, and those it returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_device, check_head_map, check_integers
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.tensors import wide_dtype

# Token ids are int32 in every back end, and blocks reach beyond the last of them.
MAX_VOCABULARY = 2**30
ORDERS = ("top_k_first", "joint")


class SoftTokenInputs(NamedTuple):
    """What `soft_token` reads of all rows; shapes and meaning as there.

    logits: None: they come from the head. head: None: candidates keep their logits. joint: top-p is
    a share of the whole vocabulary.
    """

    logits: Tensor | None
    embed: Tensor | None = None
    terminal_ids: Tensor | None = None
    head: LMHead | None = None
    joint: bool = False

    @property
    def source(self) -> Tensor:
        """The tensor whose rows are sampled: logits [B, V] or hidden states [B, H]."""
        if self.logits is not None:
            return self.logits
        assert self.head is not None  # `checked` has seen it
        return self.head.hidden

    @staticmethod
    def checked(
        logits: Tensor | None,
        embed: Tensor | None,
        terminal_ids: Tensor | None,
        hidden: Tensor | None,
        lm_head: Tensor | None,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        order: str,
    ) -> SoftTokenInputs:
        """From the arguments of `soft_token`.

        Raises:
            ValueError: they do not fit together; the message names what.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        head = None
        if hidden is not None and lm_head is not None:
            head = LMHead(hidden, lm_head, bias, softcap, logit_scale)
        elif logits is None:
            raise ValueError("give logits, or hidden and lm_head to compute them from")
        elif hidden is not None or lm_head is not None:
            raise ValueError("hidden and lm_head go together: give both or neither")
        inputs = SoftTokenInputs(logits, embed, terminal_ids, head, order == "joint")
        inputs._check()
        return inputs

    def _check(self) -> None:
        source, vocabulary = self.source, None
        if self.logits is not None:
            _check_logits(self.logits)
            vocabulary = self.logits.shape[1]
        if self.head is not None:
            vocabulary = _check_head(self.head, source, vocabulary)
            if self.joint:
                raise ValueError(
                    "order 'joint' takes the logits as they are: leave out hidden and lm_head"
                )
        assert vocabulary is not None
        if vocabulary > MAX_VOCABULARY:
            raise ValueError(f"at most {MAX_VOCABULARY} tokens, not {vocabulary}")
        if self.embed is not None:
            _check_embed(self.embed, vocabulary, source.device)
        if self.terminal_ids is not None:
            _check_terminal_ids(self.terminal_ids, source)


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be floating [B, V], not {logits.dtype} {list(logits.shape)}")


def _check_head(head: LMHead, source: Tensor, vocabulary: int | None) -> int:
    """The vocabulary, that of the head where there are no logits."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if vocabulary is not None:
        fits = fits and hidden.shape[0] == source.shape[0] and weight.shape[0] >= vocabulary
    if not fits:
        rows, tokens = ("B", "V") if vocabulary is None else (source.shape[0], vocabulary)
        raise ValueError(
            f"need hidden [{rows}, H] and lm_head [{tokens}, H], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    vocabulary = weight.shape[0] if vocabulary is None else vocabulary
    check_head_map(head.softcap, head.logit_scale)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head {weight.dtype}: cast one of them")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < vocabulary):
        raise ValueError(f"bias must be [V = {vocabulary}], not {list(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("lm_head", weight), ("bias", bias)):
        if tensor is not None:
            check_device(name, tensor, source.device)
    return vocabulary


def _check_embed(embed: Tensor, vocabulary: int, device: torch.device) -> None:
    if embed.dim() != 2 or embed.shape[0] < vocabulary or not embed.is_floating_point():
        raise ValueError(
            f"embed must be floating [V = {vocabulary}, H], not {embed.dtype} {list(embed.shape)}"
        )
    check_device("embed", embed, device)


def _check_terminal_ids(terminal_ids: Tensor, source: Tensor) -> None:
    if terminal_ids.dim() != 2 or terminal_ids.shape[0] != source.shape[0]:
        raise ValueError(
            f"terminal_ids must be [{source.shape[0]}, E], not {list(terminal_ids.shape)}"
        )
    check_integers("terminal_ids", terminal_ids)
    check_device("terminal_ids", terminal_ids, source.device)


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
        kept_mass: [B], what softmax(logits / temperature) over the vocabulary gives the set that
            the token was drawn from, so that token_logp + log kept_mass is the token's log p over
            the vocabulary; with hidden and lm_head the candidates have their logits from there.
            1 in greedy rows; NaN where kind is 1, for it is not computed there, and in skipped and
            invalid rows. Or None.
        valid: bool [B], False where the logits hold NaN or +inf or nothing finite, where the
            largest divided by the temperature is not finite, and, on a device, where a parameter of
            the row is out of its range: to look at it on the host would wait. (On the CPU such a
            row is a ValueError.) Such a row holds what a skipped one holds, token -1: never a token
            that nobody asked for. Skipped rows are valid.
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
    kept_mass: Tensor | None
    valid: Tensor

    @staticmethod
    def layout(
        source: Tensor,
        k_max: int,
        embed: Tensor | None,
        need_lse: bool,
        need_entropy: bool,
        need_kept_mass: bool = False,
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]] | None]:
        """(dtype, shape) of every field for these logits [B, V] or hidden states [B, H]; None
        where it is not wanted."""
        rows = source.shape[0]
        wide = wide_dtype(source.dtype)
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
            "kept_mass": (wide, (rows,)) if need_kept_mass else None,
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
        for statistic in (self.lse, self.entropy, self.kept_mass):
            if statistic is not None:
                statistic.fill_(torch.nan)


# In the order in which the ops take them.
OUTPUTS = tuple(field.name for field in fields(SoftToken))
