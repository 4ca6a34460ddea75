"""Computes a plan: packed inputs from the record, the forward pass, the draw, back to the record."""

from __future__ import annotations

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
        rows = torch.from_numpy(last_row[[index for _, index in plan.samplers]])
        hidden_BH = hidden_TH.index_select(0, rows.to(self.device))
        sequences = [sequence for sequence, _ in plan.samplers]
        return self._draw(sequences, hidden_BH)

    def _forward(self, chunks: Seq[Chunk]) -> Tensor:
        """Final hidden states [T, H] of the chunks, packed."""
        decode = all(chunk.length == 1 for chunk in chunks)
        positions, slots, sources, indices, prompt = [], [], [], [], []
        for chunk in chunks:
            sequence = chunk.sequence
            split = len(sequence.prompt)
            for position in range(chunk.start, chunk.start + chunk.length):
                page = sequence.pages[position // PAGE_SIZE]
                slots.append(page * PAGE_SIZE + position % PAGE_SIZE)
                positions.append(position)
                sources.append(sequence.row)
                indices.append(position - split)
                prompt.append(sequence.prompt[position] if position < split else -1)
        packed = torch.tensor([positions, slots, sources, indices, prompt], device=self.device)
        positions_T, slots_T, rows_T, indices_T, prompt_T = packed.unbind(0)
        attention = PagedAttention(
            self.k_pages,
            self.v_pages,
            slot_mapping=slots_T,
            block_table=self._block_table(chunks),
            seq_lens=self._int32([chunk.start + chunk.length for chunk in chunks]),
            query_starts=None
            if decode
            else self._int32(np.cumsum([0, *(chunk.length for chunk in chunks)])),
            num_heads=self.decoder.config.num_heads,
        )
        return self.decoder(self._embed(rows_T, indices_T, prompt_T), positions_T, attention)

    def _embed(self, rows_T: Tensor, indices_T: Tensor, prompt_T: Tensor) -> Tensor:
        """Input embeddings [T, H]: rows of the table for the prompt, mixtures from the record."""
        table = self.decoder.embed_weight
        generated = indices_T >= 0
        if bool(generated.all()):
            return soft_embedding(*self.record.inputs(rows_T, indices_T), table)
        embeds = table[prompt_T.clamp(min=0)]
        if bool(generated.any()):
            ids, weights = self.record.inputs(rows_T[generated], indices_T[generated])
            embeds[generated] = soft_embedding(ids, weights, table)
        return embeds

    def _block_table(self, chunks: Seq[Chunk]) -> Tensor:
        width = max(len(chunk.sequence.pages) for chunk in chunks)
        table = np.zeros((len(chunks), width), dtype=np.int32)
        for row, chunk in zip(table, chunks, strict=True):
            row[: len(chunk.sequence.pages)] = chunk.sequence.pages
        return torch.from_numpy(table).to(self.device)

    def _int32(self, values: Seq[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(self.device)

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
