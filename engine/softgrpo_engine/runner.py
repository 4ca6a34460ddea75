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
from softgrpo_engine.record import DISCRETE, SOFT, Record
from softgrpo_engine.scheduler import Chunk, Plan
from softgrpo_engine.sequence import Sequence
from softgrpo_kernels import SoftToken, soft_embedding, soft_token


@dataclass(frozen=True)
class Drawn:
    """What the host learns of a step, one entry a sampler: the one device-to-host read."""

    token: list[int]
    soft: list[bool]
    valid: list[bool]


class Runner:
    """Owns the decoder, the KV pages and the record."""

    def __init__(self, decoder: Decoder, num_pages: int, rows: int) -> None:
        self.decoder = decoder
        self.device = decoder.embed_weight.device
        self.record = Record(rows, self.device)
        self.num_pages = num_pages
        self.allocate_pages()
        self._batch_rows: list[int] = []
        self._batch: tuple[Tensor, dict[str, Tensor]] | None = None

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
        self._batch = None

    @torch.inference_mode()
    def run(self, plan: Plan) -> Drawn:
        """Forward pass and draw of one step."""
        hidden_TH = self._forward(plan.chunks)
        if plan.copies:
            source, target = (torch.tensor(side) for side in zip(*plan.copies, strict=True))
            self.k_pages[:, target] = self.k_pages[:, source]
            self.v_pages[:, target] = self.v_pages[:, source]
        if not plan.samplers:
            return Drawn([], [], [])
        last_row = np.cumsum([chunk.length for chunk in plan.chunks]) - 1
        rows = self._to_device(last_row[[index for _, index in plan.samplers]])
        hidden_BH = hidden_TH.index_select(0, rows)
        sequences = [sequence for sequence, _ in plan.samplers]
        return self._draw(sequences, hidden_BH)

    def _forward(self, chunks: Seq[Chunk]) -> Tensor:
        """Final hidden states [T, H] of the chunks, packed."""
        per_chunk = [(c.start, c.length, len(c.sequence.prompt), c.sequence.row) for c in chunks]
        start, length, split, row = np.array(per_chunk, dtype=np.int64).T
        ends = length.cumsum()
        table = _block_table(chunks)
        chunk_T = np.repeat(np.arange(len(chunks)), length)
        position_T = np.arange(ends[-1]) + (start - ends + length)[chunk_T]
        page_T = table[chunk_T, position_T // PAGE_SIZE].astype(np.int64)
        attention = PagedAttention(
            self.k_pages,
            self.v_pages,
            slot_mapping=self._to_device(page_T * PAGE_SIZE + position_T % PAGE_SIZE),
            block_table=self._to_device(table),
            seq_lens=self._to_device((start + length).astype(np.int32)),
            query_starts=None
            if ends[-1] == len(chunks)
            else self._to_device(np.concatenate([[0], ends]).astype(np.int32)),
            num_heads=self.decoder.config.num_heads,
        )
        embeds_TH = self._embed(chunks, row[chunk_T], position_T - split[chunk_T])
        return self.decoder(embeds_TH, self._to_device(position_T), attention)

    def _embed(self, chunks: Seq[Chunk], row_T: np.ndarray, index_T: np.ndarray) -> Tensor:
        """Input embeddings [T, H]: rows of the table for the prompt, mixtures from the record.

        index_T: place of the position among the generated ones, negative in the prompt.
        """
        table = self.decoder.embed_weight
        generated = index_T >= 0
        rows, index = self._to_device(row_T[generated]), self._to_device(index_T[generated])
        if generated.all():
            return soft_embedding(*self.record.inputs(rows, index), table)
        embeds = table.new_empty(len(row_T), table.shape[1])
        prompts = [c.sequence.prompt[c.start : c.start + c.length] for c in chunks]
        tokens = torch.tensor(list(itertools.chain(*prompts)), device=self.device)
        embeds[self._to_device(np.flatnonzero(~generated))] = table[tokens]
        if generated.any():
            mixtures = soft_embedding(*self.record.inputs(rows, index), table)
            embeds[self._to_device(np.flatnonzero(generated))] = mixtures
        return embeds

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _draw(self, sequences: list[Sequence], hidden_BH: Tensor) -> Drawn:
        """Draws one position for each sequence and writes it into the record."""
        record, decoder = self.record, self.decoder
        rows_B, parameters = self._parameters(sequences)
        mode = record.mode[rows_B]
        soft = mode == SOFT
        index_B = torch.tensor([s.num_generated for s in sequences], device=self.device)
        prompt_B = torch.tensor([len(s.prompt) for s in sequences], device=self.device)
        logits_BV = decoder.logits(hidden_BH)
        self._hold_back_the_end(sequences, logits_BV)
        clamp = torch.stack([parameters["noise_low"], parameters["noise_high"]], dim=1)
        drawn = soft_token(
            logits_BV,
            temperature=torch.where(
                soft, parameters["soft_temperature"], parameters["temperature"]
            ),
            top_k=torch.where(soft, parameters["soft_top_k"], parameters["top_k"]),
            top_p=torch.where(soft, parameters["soft_top_p"], parameters["top_p"]),
            min_p=torch.where(soft, 0.0, parameters["min_p"]),
            gumbel_tau=parameters["tau"],
            noise=parameters["noise"],
            noise_scale=parameters["noise_scale"],
            noise_clamp=clamp,
            eps=parameters["eps"],
            seed=parameters["seed"],
            position=prompt_B + index_B,
            uid=parameters["uid"],
            stream=parameters["stream"],
            mode=mode,
            terminal_ids=record.terminal_ids[rows_B],
            k_max=record.candidates,
            # bf16 logits carry a rounding of up to 2^-9 |z|: those of the candidates are computed
            # again in fp32, as the trainer does.
            hidden=hidden_BH,
            lm_head=decoder.lm_head_weight,
        )
        self._write(rows_B, index_B, drawn)
        kind = drawn.kind
        record.mode[rows_B] = torch.where(kind == 1, SOFT, parameters["discrete_mode"]).to(
            torch.uint8
        )
        token, is_soft, valid = torch.stack(
            [drawn.token.long(), kind.long(), drawn.valid.long()]
        ).tolist()
        return Drawn(token, [bool(x) for x in is_soft], [bool(x) for x in valid])

    def force(self, sequence: Sequence, token: int) -> None:
        """Puts ``token`` at the position just drawn; the phase is discrete from here."""
        record, row, index = self.record, sequence.row, sequence.num_generated - 1
        record.ids[row, index] = -1
        record.ids[row, index, 0] = token
        record.gprime[row, index] = -torch.inf
        record.gprime[row, index, 0] = 0.0
        record.kind[row, index] = 0
        record.forced[row, index] = True
        record.token[row, index] = token
        record.logprob[row, index] = 0.0
        self.end_soft_phase(sequence)

    def end_soft_phase(self, sequence: Sequence) -> None:
        """The next position of the sample is drawn discretely."""
        mode = DISCRETE if sequence.params.temperature else 0
        self.record.mode[sequence.row] = mode

    def _parameters(self, sequences: list[Sequence]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gathered again only when the batch changes."""
        rows = [s.row for s in sequences if s.row is not None]
        if self._batch is None or rows != self._batch_rows:
            rows_B = torch.tensor(rows, device=self.device)
            self._batch_rows, self._batch = rows, (rows_B, self.record.parameters(rows_B))
        return self._batch

    def _hold_back_the_end(self, sequences: list[Sequence], logits_BV: Tensor) -> None:
        for i, sequence in enumerate(sequences):
            if sequence.num_generated < sequence.params.min_tokens and sequence.end_ids:
                logits_BV[i, sorted(sequence.end_ids)] = -torch.inf

    def _write(self, rows_B: Tensor, index_B: Tensor, drawn: SoftToken) -> None:
        record = self.record
        record.ids[rows_B, index_B] = drawn.ids
        record.gprime[rows_B, index_B] = drawn.gprime
        record.kind[rows_B, index_B] = drawn.kind
        record.forced[rows_B, index_B] = False
        record.token[rows_B, index_B] = drawn.token
        record.logprob[rows_B, index_B] = drawn.token_logp


def _block_table(chunks: Seq[Chunk]) -> np.ndarray:
    """The pages of every chunk's sequence, int32 [chunks, most pages]."""
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    table = np.zeros((len(chunks), width), dtype=np.int32)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    return table
