"""Computes a plan: inputs from the record, the forward pass, the draw, back to the record."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softgrpo_engine.attention import PagedAttention
from softgrpo_engine.kv_cache import PAGE_SIZE
from softgrpo_engine.model import Decoder
from softgrpo_engine.record import Record
from softgrpo_engine.scheduler import Chunk, Plan
from softgrpo_engine.sequence import Sequence
from softgrpo_kernels import soft_embedding, soft_token_of_rows


@dataclass(frozen=True)
class Drawn:
    """What the host learns of a step, one entry a sampler: the one device-to-host read."""

    token: list[int]
    soft: list[bool]
    valid: list[bool]


@dataclass(frozen=True)
class DecodeInputs:
    """What the device reads in a step of one position a sequence.

    row, index: int64 [B], places in the record. position: int64 [B], in the sequence. slot: int64
    [B], where its keys go. block_table: int32 [B, W]. seq_lens: int32 [B], this position included.
    """

    row: Tensor
    index: Tensor
    position: Tensor
    slot: Tensor
    block_table: Tensor
    seq_lens: Tensor


class Runner:
    """Owns the decoder, the KV pages and the record."""

    def __init__(self, decoder: Decoder, num_pages: int, rows: int) -> None:
        self.decoder = decoder
        self.device = decoder.embed_weight.device
        self.record = Record(rows, self.device)
        self.num_pages = num_pages
        self.allocate_pages()

    def allocate_pages(self) -> None:
        """Makes the KV cache: [layers, pages, Hkv, page_size, D] for keys and for values."""
        config = self.decoder.config
        shape = (
            config.num_layers,
            self.num_pages,
            config.num_kv_heads,
            PAGE_SIZE,
            config.head_dim,
        )
        dtype = self.decoder.embed_weight.dtype
        self.k_pages = torch.empty(shape, dtype=dtype, device=self.device)
        self.v_pages = torch.empty(shape, dtype=dtype, device=self.device)

    def free_pages(self) -> None:
        """Drops the KV cache; ``allocate_pages`` makes an empty one."""
        self.k_pages = self.v_pages = torch.empty(0)

    def start(self, sequence: Sequence) -> None:
        """Prepares the record row of a sample that is scheduled for the first time."""
        self.record.start(sequence)

    @torch.inference_mode()
    def run(self, plan: Plan) -> Drawn:
        """Forward pass and draw of one step."""
        if plan.is_decode:
            drawn = self._decode(self._decode_inputs(plan.chunks), self._held_back(plan.samplers))
        else:
            hidden_TH = self._prefill(plan.chunks)
            self._copy_pages(plan.copies)
            if not plan.samplers:
                return Drawn([], [], [])
            last_row = np.cumsum([chunk.length for chunk in plan.chunks]) - 1
            rows = self._to_device(last_row[[index for _, index in plan.samplers]])
            places = np.array([(s.row, s.num_generated) for s, _ in plan.samplers]).T
            row_B, index_B = self._to_device(places)
            held_back = self._held_back(plan.samplers)
            drawn = self._draw(hidden_TH.index_select(0, rows), row_B, index_B, held_back)
        token, soft, valid = drawn.tolist()
        return Drawn(token, [bool(x) for x in soft], [bool(x) for x in valid])

    def end_soft_phase(self, sequence: Sequence) -> None:
        """The next position of the sample is drawn discretely."""
        self.record.soft[sequence.row] = 0

    def force(self, sequence: Sequence, token: int) -> None:
        """Puts ``token`` at the position just drawn; the phase is discrete from here."""
        assert sequence.row is not None
        self.record.force(sequence.row, sequence.num_generated - 1, token)

    def _decode_inputs(self, chunks: Seq[Chunk]) -> DecodeInputs:
        per_sequence = [(c.sequence.row, c.sequence.num_generated, c.start) for c in chunks]
        row, index, position = np.array(per_sequence, dtype=np.int64).T
        table = _block_table(chunks)
        page = table[np.arange(len(chunks)), position // PAGE_SIZE].astype(np.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        row_B, index_B, position_B, slot_B = self._to_device(np.stack([row, index, position, slot]))
        seq_lens = self._to_device((position + 1).astype(np.int32))
        return DecodeInputs(row_B, index_B, position_B, slot_B, self._to_device(table), seq_lens)

    def _decode(self, inputs: DecodeInputs, held_back: list[tuple[int, list[int]]]) -> Tensor:
        """One position of every sequence, on the device alone: see `_draw`."""
        attention = self._attention(inputs.slot, inputs.block_table, inputs.seq_lens, None)
        candidates = self.record.inputs(inputs.row, inputs.index - 1)
        embeds_BH = soft_embedding(*candidates, self.decoder.embed_weight)
        hidden_BH = self.decoder(embeds_BH, inputs.position, attention)
        return self._draw(hidden_BH, inputs.row, inputs.index, held_back)

    def _prefill(self, chunks: Seq[Chunk]) -> Tensor:
        """Final hidden states [T, H] of chunks of any length, packed."""
        per_chunk = [(c.start, c.length, len(c.sequence.prompt), c.sequence.row) for c in chunks]
        start, length, split, row = np.array(per_chunk, dtype=np.int64).T
        ends = length.cumsum()
        table = _block_table(chunks)
        chunk_T = np.repeat(np.arange(len(chunks)), length)
        position_T = np.arange(ends[-1]) + (start - ends + length)[chunk_T]
        page_T = table[chunk_T, position_T // PAGE_SIZE].astype(np.int64)
        attention = self._attention(
            self._to_device(page_T * PAGE_SIZE + position_T % PAGE_SIZE),
            self._to_device(table),
            self._to_device((start + length).astype(np.int32)),
            self._to_device(np.concatenate([[0], ends]).astype(np.int32)),
        )
        embeds_TH = self._embed(chunks, row[chunk_T], position_T - split[chunk_T])
        return self.decoder(embeds_TH, self._to_device(position_T), attention)

    def _attention(
        self,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_starts: Tensor | None,
    ) -> PagedAttention:
        return PagedAttention(
            self.k_pages,
            self.v_pages,
            slot_mapping=slot_mapping,
            block_table=block_table,
            seq_lens=seq_lens,
            query_starts=query_starts,
            num_heads=self.decoder.config.num_heads,
        )

    def _embed(self, chunks: Seq[Chunk], row_T: np.ndarray, index_T: np.ndarray) -> Tensor:
        """Input embeddings [T, H]: rows of the table for the prompt, mixtures from the record.

        index_T: place of the position among the generated ones, negative in the prompt.
        """
        table = self.decoder.embed_weight
        generated = index_T >= 0
        embeds = table.new_empty(len(row_T), table.shape[1])
        prompts = [c.sequence.prompt[c.start : c.start + c.length] for c in chunks]
        tokens = torch.tensor([*itertools.chain(*prompts)], dtype=torch.int64, device=self.device)
        embeds[self._to_device(np.flatnonzero(~generated))] = table[tokens]
        if generated.any():
            rows, index = self._to_device(np.stack([row_T[generated], index_T[generated]]))
            mixtures = soft_embedding(*self.record.inputs(rows, index), table)
            embeds[self._to_device(np.flatnonzero(generated))] = mixtures
        return embeds

    def _draw(
        self,
        hidden_BH: Tensor,
        row_B: Tensor,
        index_B: Tensor,
        held_back: list[tuple[int, list[int]]],
    ) -> Tensor:
        """Draws a position of every row into the record; int64 [3, B]: token, soft, valid.

        held_back: (i, ids that row i may not draw).
        """
        logits_BV = self.decoder.logits(hidden_BH)
        for i, ids in held_back:
            logits_BV[i, ids] = -torch.inf
        drawn = soft_token_of_rows(
            logits_BV,
            self.record.parameters(row_B, index_B),
            terminal_ids=self.record.terminal_ids[row_B],
            # bf16 logits carry a rounding of up to 2^-9 |z|: those of the candidates are computed
            # again in fp32, as the trainer does.
            hidden=hidden_BH,
            lm_head=self.decoder.lm_head_weight,
        )
        self.record.write(row_B, index_B, drawn)
        return torch.stack([drawn.token.long(), drawn.kind.long(), drawn.valid.long()])

    def _held_back(self, samplers: list[tuple[Sequence, int]]) -> list[tuple[int, list[int]]]:
        """The ends of samples that have not yet their min_tokens."""
        return [
            (i, sorted(sequence.end_ids))
            for i, (sequence, _) in enumerate(samplers)
            if sequence.num_generated < sequence.params.min_tokens and sequence.end_ids
        ]

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, target = (torch.tensor(side) for side in zip(*copies, strict=True))
            self.k_pages[:, target] = self.k_pages[:, source]
            self.v_pages[:, target] = self.v_pages[:, source]

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _block_table(chunks: Seq[Chunk]) -> np.ndarray:
    """The pages of every chunk's sequence, int32 [chunks, most pages]."""
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    table = np.zeros((len(chunks), width), dtype=np.int32)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    return table
