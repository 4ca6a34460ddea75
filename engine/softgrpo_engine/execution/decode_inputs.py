"""What the device reads in a step of one position a sequence, as one block of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class DecodeShape(NamedTuple):
    """rows: B. pages: W, the width of the block table. ends: E, ids held back from a row.
    entropies: M, 1 where the step gives entropies, else 0. noises: N, 1 where noise is added to
    mixtures, else 0. unlisted: a row may draw from the whole vocabulary."""

    rows: int
    pages: int
    ends: int
    entropies: int = 0
    noises: int = 0
    unlisted: bool = False

    @property
    def words(self) -> int:
        """32-bit words of the block."""
        narrow = self.pages + 1 + self.entropies + self.noises
        return self.rows * (2 * (4 + self.ends) + narrow)


class DecodeTables(NamedTuple):
    """On the host, those of `DecodeInputs` that have a row of some width for every sequence."""

    block_table: np.ndarray
    held_back: np.ndarray
    temperature: np.ndarray
    deviation: np.ndarray

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(len(self.block_table), *(table.shape[1] for table in self))


@dataclass(frozen=True)
class DecodeInputs:
    """row, index: int64 [B], places in the record. position: int64 [B], in the sequence. slot:
    int64 [B], where its keys go. held_back: int64 [B, E], tokens that a row may not draw, -1 pads.
    block_table: int32 [B, W]. seq_lens: int32 [B], this position included. temperature: float32
    [B, M], of the entropies. deviation: float32 [B, N], of the noise on mixtures. unlisted: a row
    may draw from the whole vocabulary.
    """

    row: Tensor
    index: Tensor
    position: Tensor
    slot: Tensor
    held_back: Tensor
    block_table: Tensor
    seq_lens: Tensor
    temperature: Tensor
    deviation: Tensor
    unlisted: bool

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    @staticmethod
    def views(words: Tensor, shape: DecodeShape) -> DecodeInputs:
        """The inputs in a block of int32 [shape.words], on the host or on the device: one copy
        moves them all."""
        rows, pages, ends, entropies, noises, unlisted = shape
        wide_words = 2 * rows * (4 + ends)
        wide, narrow = words.split([wide_words, shape.words - wide_words])
        *places, held_back = wide.view(torch.int64).split([rows] * 4 + [rows * ends])
        block_table, seq_lens, temperature, deviation = narrow.split(
            [rows * pages, rows, rows * entropies, rows * noises]
        )
        row, index, position, slot = places
        return DecodeInputs(
            row,
            index,
            position,
            slot,
            held_back.view(rows, ends),
            block_table.view(rows, pages),
            seq_lens,
            temperature.view(torch.float32).view(rows, entropies),
            deviation.view(torch.float32).view(rows, noises),
            unlisted,
        )
