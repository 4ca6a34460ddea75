"""Computes a plan: inputs from the record, the forward pass, the draw, back to the record."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softgrpo_engine.execution.attention_backends import Attend, HostBatch, attention_backend
from softgrpo_engine.execution.cuda_graphs import DecodeGraphs, bucket
from softgrpo_engine.execution.decode_inputs import DecodeInputs, DecodeShape, DecodeTables
from softgrpo_engine.execution.entropy import entropy
from softgrpo_engine.execution.prompt_logprobs import prompt_logprobs
from softgrpo_engine.execution.record import Record
from softgrpo_engine.model.attention import PagedAttention, attend_by_kernels
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE
from softgrpo_engine.scheduling.scheduler import Chunk, Plan
from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_engine.transfer import ToHost, to_device
from softgrpo_kernels import embedding_noise
from softgrpo_kernels.embedding_noise import root_mean_square, with_noise
from softgrpo_kernels.lm_head import LMHead


@dataclass(frozen=True)
class Drawn:
    """What the host learns of a step, one entry a sampler: the one device-to-host read.

    entropy: where the step was asked for it, see `entropy_rules`.
    """

    token: list[int]
    soft: list[bool]
    valid: list[bool]
    entropy: list[float] | None


class Launched:
    """The tokens of a step on their way to the host."""

    def __init__(self, drawn: Tensor) -> None:
        self._drawn = ToHost(drawn)

    def read(self) -> Drawn:
        """Waits for the step, and for nothing that was launched after it."""
        drawn = self._drawn.wait()
        token, soft, valid = drawn[:3].tolist()
        entropy = drawn[3].int().view(torch.float32).tolist() if len(drawn) > 3 else None
        return Drawn(token, [bool(x) for x in soft], [bool(x) for x in valid], entropy)


class Runner:
    """Owns the decoder, the KV pages and the record.

    The last page and the last row of the record belong to no sequence: the rows that pad a batch
    read and write them.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_pages: int,
        rows: int,
        attention: str = "kernels",
    ) -> None:
        self.decoder = decoder
        self.device = decoder.embed_weight.device
        dtype = decoder.embed_weight.dtype
        self.attention = attention_backend(attention, decoder.config, dtype, self.device)
        self.record = Record(rows + 1, self.device)
        self.record.skip(rows)
        self.max_batch_size, self.padding_row = rows, rows
        self.num_pages = self.padding_page = num_pages
        self.k_pages, self.v_pages = self._new_pages(), self._new_pages()
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda" and self.attention.in_graphs:
            self.graphs = DecodeGraphs(self._decode, self._addresses, self.device)

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._embedding_unit: float | None = None
        self._weights = tuple(tensor.data_ptr() for tensor in decoder.tensors())

    def _new_pages(self) -> Tensor:
        """Keys or values of the KV cache, [layers, pages, Hkv, page_size, D]."""
        config = self.decoder.config
        shape = (
            config.num_layers,
            self.num_pages + 1,
            config.num_kv_heads,
            PAGE_SIZE,
            config.head_dim,
        )
        dtype = self.decoder.embed_weight.dtype
        return torch.empty(shape, dtype=dtype, device=self.device)

    def free_pages(self) -> None:
        """Gives the memory of the KV cache back until ``allocate_pages``.

        The tensors stay, without memory. So do the graphs: they are recorded again only if the
        memory comes back at another address.
        """
        for pages in (self.k_pages, self.v_pages):
            pages.untyped_storage().resize_(0)

    def allocate_pages(self) -> None:
        """Takes the memory of the KV cache again; what it holds is undefined."""
        for pages in (self.k_pages, self.v_pages):
            pages.untyped_storage().resize_(pages.nbytes)

    def drop_graphs(self) -> None:
        """Gives the memory of recorded graphs back; they are recorded again when needed."""
        if self.graphs is not None:
            self.graphs.clear()

    @torch.inference_mode()
    def run(self, plan: Plan) -> Launched:
        """Starts the forward pass and draw of a step; on a GPU it returns before they are done."""
        self.record.start(plan.started)
        if plan.is_decode:
            return Launched(self._launch_decode(plan))
        hidden_TH = self._prefill(plan.chunks)
        self._copy_pages(plan.copies)
        self._score_prompts(plan.chunks, hidden_TH)
        if not plan.samplers:
            return Launched(torch.empty(3, 0, dtype=torch.int64))
        last_row = np.cumsum([chunk.length for chunk in plan.chunks]) - 1
        rows = self._to_device(last_row[[index for _, index in plan.samplers]])
        places = np.array([(s.row, s.num_generated) for s, _ in plan.samplers]).T
        row_B, index_B = self._to_device(places.copy())
        samplers = [sequence for sequence, _ in plan.samplers]
        held_back = self._to_device(_held_back(samplers))
        temperature = self._to_device(_entropy_temperature(samplers))
        hidden_BH = hidden_TH.index_select(0, rows)
        unlisted = any(sequence.may_draw_unlisted for sequence in samplers)
        return Launched(self._draw(hidden_BH, row_B, index_B, held_back, temperature, unlisted))

    def set_soft_phase(self, sequence: Sequence) -> None:
        """The next position of the sample is drawn in the phase that the host has set."""
        assert sequence.row is not None
        self.record.set_soft_phase(sequence.row, sequence.soft_phase)

    def force(self, sequence: Sequence, token: int) -> None:
        """Puts ``token`` after those read so far; the phase is discrete from here."""
        assert sequence.row is not None
        self.record.force(sequence.row, len(sequence.tokens), token)

    def _score_prompts(self, chunks: Seq[Chunk], hidden_TH: Tensor) -> None:
        """Log p of the prompts' tokens that follow these positions, where they were asked for."""
        rows = hidden_TH.split([chunk.length for chunk in chunks])
        for chunk, hidden in zip(chunks, rows, strict=True):
            sequence = chunk.sequence
            following = sequence.prompt[chunk.start + 1 : chunk.start + 1 + chunk.length]
            top = sequence.params.prompt_logprobs
            if sequence.scores_prompt and following and top is not None:
                ids = self._to_device(np.array(following, dtype=np.int64))
                part = prompt_logprobs(hidden[: len(following)], ids, self.decoder, top)
                sequence.prompt_parts.append(part)

    def _launch_decode(self, plan: Plan) -> Tensor:
        """What `_draw` gives; on a GPU from a graph where the attention can be in one."""
        sequences = [chunk.sequence for chunk in plan.chunks]
        tables = DecodeTables(
            _block_table(plan.chunks),
            _held_back(sequences),
            _entropy_temperature(sequences),
            self._deviation(sequences),
        )
        unlisted = any(sequence.may_draw_unlisted for sequence in sequences)
        shape = tables.shape._replace(unlisted=unlisted)
        if self.graphs is None:
            words = self._decode_words(shape, plan.chunks, tables)
            inputs = DecodeInputs.views(words.to(self.device, non_blocking=True), shape)
            seq_lens = DecodeInputs.views(words, shape).seq_lens.numpy()
            batch = HostBatch(tables.block_table, seq_lens, None)
            return self._decode(inputs, self.attention.plan(batch))
        padded = bucket(shape, self.max_batch_size)
        words = self._decode_words(padded, plan.chunks, tables)
        none = DecodeTables(*(table[:0] for table in tables))
        drawn = self.graphs(words, lambda: self._decode_words(padded, [], none), padded)
        return drawn[:, : shape.rows]

    def _decode_words(self, shape: DecodeShape, chunks: Seq[Chunk], tables: DecodeTables) -> Tensor:
        """The inputs of these chunks on the host, filled up with padding to the shape."""
        words = torch.empty(shape.words, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        parts = DecodeInputs.views(words, shape).tensors
        inputs = {name: part.numpy() for name, part in parts.items()}
        count = len(chunks)
        places = [(c.sequence.row, c.sequence.num_generated, c.start) for c in chunks]
        row, index, position = np.array(places, dtype=np.int64).reshape(count, 3).T
        page = tables.block_table[np.arange(count), position // PAGE_SIZE].astype(np.int64)
        # A batch has at most 15 rows of padding: each has a slot of its own.
        pad_slots = self.padding_page * PAGE_SIZE + np.arange(shape.rows - count) % PAGE_SIZE
        for name, values, padding in (
            ("row", row, self.padding_row),
            ("index", index, 1),  # it reads the position before
            ("position", position, 0),
            ("slot", page * PAGE_SIZE + position % PAGE_SIZE, pad_slots),
            ("seq_lens", position + 1, 1),
        ):
            inputs[name][:count], inputs[name][count:] = values, padding
        for name, table, padding in zip(
            DecodeTables._fields, tables, (self.padding_page, -1, 1, 0), strict=True
        ):
            inputs[name].fill(padding)
            inputs[name][:count, : table.shape[1]] = table
        return words

    def _decode(self, inputs: DecodeInputs, attend: Attend = attend_by_kernels) -> Tensor:
        """One position of every sequence, on the device alone: see `_draw`."""
        attention = self._attention(inputs.slot, inputs.block_table, inputs.seq_lens, None, attend)
        embeds_BH = self._mixtures(inputs.row, inputs.index, inputs.deviation, before=1)
        hidden_BH = self.decoder(embeds_BH, inputs.position, attention)
        return self._draw(
            hidden_BH,
            inputs.row,
            inputs.index,
            inputs.held_back,
            inputs.temperature,
            inputs.unlisted,
        )

    def _addresses(self) -> tuple[int, ...]:
        """Of every tensor that `_decode` finds by itself; and the sizes of the record, which may
        have grown and lie where it once lay."""
        tensors = (*self.record.tensors, self.k_pages, self.v_pages)
        addresses = (tensor.data_ptr() for tensor in tensors)
        return (*addresses, *self.record.drawn.ids.shape, *self._weights)

    def _prefill(self, chunks: Seq[Chunk]) -> Tensor:
        """Final hidden states [T, H] of chunks of any length, packed."""
        per_chunk = [(c.start, c.length, len(c.sequence.prompt), c.sequence.row) for c in chunks]
        start, length, split, row = np.array(per_chunk, dtype=np.int64).T
        ends = length.cumsum()
        table = _block_table(chunks)
        chunk_T = np.repeat(np.arange(len(chunks)), length)
        position_T = np.arange(ends[-1]) + (start - ends + length)[chunk_T]
        page_T = table[chunk_T, position_T // PAGE_SIZE].astype(np.int64)
        seq_lens = (start + length).astype(np.int32)
        starts = np.concatenate([[0], ends]).astype(np.int32)
        attention = self._attention(
            self._to_device(page_T * PAGE_SIZE + position_T % PAGE_SIZE),
            self._to_device(table),
            self._to_device(seq_lens),
            self._to_device(starts),
            self.attention.plan(HostBatch(table, seq_lens, starts)),
        )
        embeds_TH = self._embed(chunks, chunk_T, row[chunk_T], position_T - split[chunk_T])
        return self.decoder(embeds_TH, self._to_device(position_T), attention)

    def _attention(
        self,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_starts: Tensor | None,
        attend: Attend,
    ) -> PagedAttention:
        return PagedAttention(
            self.k_pages,
            self.v_pages,
            slot_mapping=slot_mapping,
            block_table=block_table,
            seq_lens=seq_lens,
            query_starts=query_starts,
            num_heads=self.decoder.config.num_heads,
            attend=attend,
        )

    def _embed(
        self, chunks: Seq[Chunk], chunk_T: np.ndarray, row_T: np.ndarray, index_T: np.ndarray
    ) -> Tensor:
        """Input embeddings [T, H]: rows of the table for the prompt, mixtures from the record.

        chunk_T: index into chunks. index_T: place of the position among the generated ones,
        negative in the prompt.
        """
        table = self.decoder.embed_weight
        generated = index_T >= 0
        embeds = table.new_empty(len(row_T), table.shape[1])
        prompts = [c.sequence.prompt[c.start : c.start + c.length] for c in chunks]
        tokens = self._to_device(np.array([*itertools.chain(*prompts)], dtype=np.int64))
        embeds[self._to_device(np.flatnonzero(~generated))] = table[tokens]
        if generated.any():
            rows, index = self._to_device(np.stack([row_T[generated], index_T[generated]]))
            deviation_C = self._deviation([chunk.sequence for chunk in chunks])
            deviation = self._to_device(deviation_C[chunk_T[generated]])
            mixtures = self._mixtures(rows, index, deviation)
            embeds[self._to_device(np.flatnonzero(generated))] = mixtures
        return embeds

    def _mixtures(
        self, row_T: Tensor, index_T: Tensor, deviation_TN: Tensor, before: int = 0
    ) -> Tensor:
        """What stands for generated positions index_T - before, [T, H]: mixtures from the record,
        and on soft ones noise of that standard deviation, float32 [T, N]; N is 0 where there is
        none."""
        mixtures_TH = self.record.mixtures(row_T, index_T, self.decoder.embed_weight, before)
        if not deviation_TN.shape[1]:
            return mixtures_TH
        index_T = index_T - before
        seed, position, uid, stream = self.record.noise_keys(row_T, index_T)
        noise_TH = embedding_noise(mixtures_TH.shape[1], seed, position, uid, stream)
        soft_T = self.record.drawn.kind[row_T, index_T]
        return with_noise(mixtures_TH, noise_TH, deviation_TN * soft_T[:, None])

    def _deviation(self, sequences: Seq[Sequence]) -> np.ndarray:
        """Of the noise on their mixtures, float32 [B, 1], where one of the sequences has it, else
        [B, 0]."""
        scales = np.array([sequence.embedding_noise for sequence in sequences])[:, None]
        if not scales.any():
            return np.empty((len(sequences), 0), dtype=np.float32)
        if self._embedding_unit is None:
            self._embedding_unit = float(root_mean_square(self.decoder.embed_weight))
        return (scales * self._embedding_unit).astype(np.float32)

    def _draw(
        self,
        hidden_BH: Tensor,
        row_B: Tensor,
        index_B: Tensor,
        held_back_BE: Tensor,
        temperature_BM: Tensor,
        unlisted: bool,
    ) -> Tensor:
        """Draws a position of every row into the record; int64 [3, B]: token, soft, valid.

        held_back_BE: int64, ids that a row may not draw, -1 pads. temperature_BM: float32, M is 0
        or 1; with 1 there is a fourth row, the bits of the entropy at that temperature (float32).
        unlisted: a row may draw from the whole vocabulary.
        """
        logits_BV = self.decoder.logits(hidden_BH)
        if held_back_BE.shape[1]:
            # The smaller of logit and bound: a pad, whatever id it stands for, changes nothing.
            bound_BE = torch.where(held_back_BE < 0, torch.inf, -torch.inf).to(logits_BV.dtype)
            logits_BV.scatter_reduce_(1, held_back_BE.clamp(min=0), bound_BE, "amin")
        asked = temperature_BM.shape[1]
        drawn = torch.empty(3 + asked, len(row_B), dtype=torch.int64, device=self.device)
        if asked:
            drawn[3] = entropy(logits_BV, temperature_BM).view(torch.int32)
        # bf16 logits carry a rounding of up to 2^-9 |z|: those of the candidates are computed again
        # in fp32, as the trainer does.
        head = LMHead(hidden_BH, self.decoder.lm_head_weight)
        self.record.draw(row_B, index_B, logits_BV, drawn[:3], head, unlisted)
        return drawn

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, target = self._to_device(np.array(copies).T.copy())
            self.k_pages[:, target] = self.k_pages[:, source]
            self.v_pages[:, target] = self.v_pages[:, source]

    def _to_device(self, values: np.ndarray) -> Tensor:
        return to_device(values, self.device)


def _block_table(chunks: Seq[Chunk]) -> np.ndarray:
    """The pages of every chunk's sequence, int32 [chunks, most pages]."""
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    table = np.zeros((len(chunks), width), dtype=np.int32)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    return table


def _held_back(sequences: Seq[Sequence]) -> np.ndarray:
    """What the sequences may not draw yet: int64 [B, most], -1 pads."""
    ids = [sequence.held_back for sequence in sequences]
    table = np.full((len(ids), max(map(len, ids))), -1, dtype=np.int64)
    for row, held in zip(table, ids, strict=True):
        row[: len(held)] = held
    return table


def _entropy_temperature(sequences: Seq[Sequence]) -> np.ndarray:
    """The soft temperatures, float32 [B, 1], where one of the sequences asks for its entropy, else
    [B, 0]."""
    asks = any(sequence.asks_entropy for sequence in sequences)
    values = [s.soft.temperature if s.soft else 1.0 for s in sequences]
    return np.array(values, dtype=np.float32)[:, None][:, : int(asks)]
