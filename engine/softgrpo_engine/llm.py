"""The engine: continuous batching of soft and discrete samples over a paged KV cache."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from softgrpo_engine.execution.memory import pages_that_fit, return_freed_memory
from softgrpo_engine.execution.runner import Launched, Runner
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.source import resolve_model
from softgrpo_engine.model.weights import empty_decoder, load_decoder, load_weights
from softgrpo_engine.outputs import Output, Sample
from softgrpo_engine.params import SamplingParams, SoftParams
from softgrpo_engine.requests.admission import check_fits, check_sizes, make_groups
from softgrpo_engine.requests.call import Call
from softgrpo_engine.requests.progress import TokenRate, load_metrics, sample_progress
from softgrpo_engine.requests.prompts import Prompt, as_list, encode, uids_of_call
from softgrpo_engine.requests.samples import as_sample, finish_reason
from softgrpo_engine.scheduling.kv_cache import BlockPool
from softgrpo_engine.scheduling.scheduler import Plan, Scheduler
from softgrpo_engine.scheduling.sequence import Sequence

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LLM:
    """Batch generation with soft tokens.

        llm = LLM("smollm2-135m")
        outputs = llm.generate("What is 2 + 3?", SamplingParams(n=4), SoftParams())

    model: hub id, local directory, alias, or a Decoder with its tokenizer. dtype: "bfloat16" or
    "float32". kv_memory: GiB of KV cache; by default what max_batch_size samples of max_model_len
    need, at most a quarter of the free memory; math.inf: what they need, or a ValueError.
    max_model_len: tokens of prompt and answer, by default what the model was made for.
    max_batch_size: samples in progress at once.
    max_batch_tokens: positions computed in one step; longer prompts are computed in chunks.
    batch_invariant: a sample has the same bits whatever it shares a batch with, on any CPU; where
    the CPU has a matrix unit for bfloat16 that is so in any case. attention: "kernels" (ours), or
    on a GPU "flashinfer" or "varlen" (PyTorch's).
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        tokenizer: Any = None,
        dtype: str = "bfloat16",
        device: str = "auto",
        max_model_len: int | None = None,
        kv_memory: float | None = None,
        max_batch_size: int = 256,
        max_batch_tokens: int = 8192,
        batch_invariant: bool = False,
        attention: str = "kernels",
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is not allowed: must be bfloat16 or float32")
        sizes = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
        check_sizes(**sizes, max_model_len=max_model_len)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model_path: Path | None = None
        if isinstance(model, Decoder):
            decoder = model
        else:
            self.model_path = resolve_model(str(model))
            decoder = load_decoder(self.model_path, _DTYPES[dtype], device)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(self.model_path))
        self.tokenizer = tokenizer
        self.config = decoder.config
        self.dtype = decoder.embed_weight.dtype
        self.batch_invariant = batch_invariant
        decoder.pack(batch_invariant=batch_invariant)
        self.max_model_len = max_model_len or self.config.max_position_embeddings
        if self.max_model_len > self.config.max_position_embeddings:
            raise ValueError(
                f"max_model_len={max_model_len} is more than the model's "
                f"{self.config.max_position_embeddings}: shorten the prompts or the answers"
            )
        self.default_soft = SoftParams.of_model(self.model_path) if self.model_path else None
        self.weight_version = 0
        self._initial_weights = True
        num_pages = pages_that_fit(decoder, kv_memory, max_batch_size, self.max_model_len)
        self.pool = BlockPool(num_pages)
        self.scheduler = Scheduler(self.pool, max_batch_size, max_batch_tokens)
        self.runner = Runner(decoder, num_pages, max_batch_size, attention)
        self.device = self.runner.device
        self.rate = TokenRate()
        self._awake = True
        self.overlap = self.runner.graphs is not None
        self._launched: tuple[Plan, Launched] | None = None  # not read yet

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
        soft: SoftParams | Literal[False] | None = None,
        progress: bool = True,
    ) -> list[Output]:
        """Samples every prompt ``params.n`` times; outputs in the order of the prompts.

        prompts: a text, token ids, chat messages, or a list of these. soft: None is the setting the
        model was exported with (softgrpo.json), else discrete; False is discrete.
        """
        return self._finish(self.submit(prompts, params, soft), progress)

    def generate_groups(
        self,
        prompts: Seq[list[int]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        uids: Seq[Seq[int]],
        stream: int = 0,
    ) -> list[Output]:
        """Samples prompt i once for each uid of ``uids[i]``; a group computes its prompt once.

        A sample is a function of (weights, prompt, seed, stream, uid, parameters), up to the
        rounding of the GEMM; what it shares a batch with does not matter.
        """
        call = self.submit(prompts, params, soft, seed=seed, uids=uids, stream=stream)
        return self._finish(call, progress=False)

    def iter_groups(
        self,
        groups: Iterable[tuple[list[int], Seq[int]]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        stream: int = 0,
        between_steps: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Output]]:
        """Like ``generate_groups`` of (prompt, uids); yields (place, Output) as a group has ended.
        The next is asked for when there is room: several engines may share a queue. What
        ``between_steps`` raises ends all samples."""
        coming, call = iter(groups), Call(self._samples)
        keys: dict[str, Any] = {"seed": seed, "stream": stream, "call": call}
        try:
            while True:
                while (self.scheduler.has_room or call.is_done) and (new := next(coming, None)):
                    self.submit([new[0]], params, soft, uids=[new[1]], **keys)
                if call.is_done:
                    return
                between_steps()
                self.step()
                yield from call.ended()
        finally:
            self.release(call)

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
        soft: SoftParams | Literal[False] | None = None,
    ) -> Iterator[tuple[int, Sample]]:
        """Yields (prompt index, the sample so far) for each new token, and once when it has ended.

        Streams may be read in turns: all that is in progress shares the steps.
        """
        call = self.submit(prompts, params, soft)
        try:
            while not call.is_read:
                if not call.has_news:
                    self.step()
                yield from call.news()
        finally:
            self.release(call)

    def submit(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int | None = None,
        uids: Seq[Seq[int]] | None = None,
        stream: int = 0,
        call: Call | None = None,
    ) -> Call:
        """Queues samples that ``step`` computes, until ``release``; call: one that they join.

        Raises ValueError for a request that can never be done, before any of it is queued.
        """
        self._check_ready()
        params = params or SamplingParams()
        soft = self.default_soft if soft is None else soft or None
        ids = [encode(prompt, self.tokenizer) for prompt in as_list(prompts)]
        self.check_fits(ids, params)
        if seed is None:
            seed = params.seed if params.seed is not None else secrets.randbits(63)
        if uids is None:
            uids = uids_of_call(ids, params.n)
        groups = make_groups(ids, params, soft, seed, uids, stream, self.config, self.tokenizer)
        slots = max((sequence.slots for group in groups for sequence in group), default=1)
        self.runner.record.reserve(params.max_tokens, slots, params.kept_mass)
        call = call or Call(self._samples)
        for sequence in call.add(ids, groups):
            self.scheduler.add(sequence)
        return call

    def step(self) -> list[Sequence]:
        """One step: plan, launch, commit, read. Returns the sequences that got a token.

        On a GPU a step is read when the next one has been launched: the host works while the device
        computes. A sample that has ended is then computed for a position too many: nobody sees it.
        """
        if not self.scheduler.has_work:
            return []
        start = time.perf_counter()
        try:
            # The end of thinking may change what was drawn, before the next step reads it.
            drawn = self._launched[0].samplers if self._launched else []
            advanced = self._read() if any(s.is_awaited for s, _ in drawn) else []
            launched = self._launch()
            advanced += self._read()
            self._launched = launched
            if not self.overlap:
                advanced += self._read()
        except BaseException as error:
            # Half a step cannot be taken up again: nothing that is in progress goes on.
            self._launched = None
            for sequence in self.scheduler.active:
                sequence.error = error
            self._abort(self.scheduler.active)
            raise
        self.rate.add(len(advanced), time.perf_counter() - start)
        return advanced

    def release(self, call: Call) -> None:
        """Takes out what is left of a call: nothing stays behind, also after an error."""
        self._abort([s for s in call.sequences if s.sample is None])
        self.scheduler.check_when_idle()

    def abort(self, sample: Sample | Sequence) -> None:
        """Ends a sample that ``stream`` gave, or one of a Call, and no other caller's of the same
        uid; it comes back with what it has and finish_reason "abort"."""
        name = (sample.group, sample.uid)
        self._abort([s for s in self.scheduler.active if (s.group, s.uid) == name])

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights in place (Hugging Face names, every parameter once).

        Nothing computed with the old weights is used again. The engine must be idle; it may sleep.
        Raises ValueError for a name or shape that the model does not have, or one that is missing;
        the engine then has no weights until an update succeeds.
        """
        self._check_idle("update_weights")
        self._initial_weights = False
        decoder = self.runner.decoder
        if not self.has_weights:
            decoder = empty_decoder(self.config, self.dtype, self.runner.device)
        self._drop_weights()  # for good, if some tensors turn out to be new and some old
        load_weights(decoder, iter(named_tensors))
        self._take_weights(decoder)
        self.weight_version = version

    def sleep(self, weights: bool = True) -> None:
        """Frees the KV cache, and with ``weights`` these and the graphs, of an idle engine."""
        self._check_idle("sleep")
        self.pool.clear()
        self.runner.free_pages()
        self._awake = False
        if weights:
            self._drop_weights()
            self.runner.drop_graphs()
        return_freed_memory(self.device, of_modules=weights)

    def wake(self) -> None:
        """Takes the memory of the KV cache again after ``sleep``. Weights of ``model_path`` that
        were never updated are read again; others must come by ``update_weights``, now or before."""
        if self.model_path is not None and self._initial_weights and not self.has_weights:
            self._take_weights(load_decoder(self.model_path, self.dtype, self.runner.device))
        if not self._awake:
            self.runner.allocate_pages()
            self._awake = True

    @property
    def has_weights(self) -> bool:
        """False after ``sleep``, and after an update that failed."""
        return not self.runner.decoder.embed_weight.is_meta

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and what is in progress now; rates are tokens/s of work."""
        return load_metrics(self.scheduler, self.rate) | {"weight_version": self.weight_version}

    def check_fits(self, prompts: Seq[list[int]], params: SamplingParams) -> None:
        """Raises ValueError, naming the prompt, unless every prompt and its answer can fit."""
        check_fits(
            prompts,
            params,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_model_len,
            num_pages=self.pool.num_pages,
        )

    def _finish(self, call: Call, progress: bool) -> list[Output]:
        """Steps until a call is done; a bar on stderr shows its samples."""
        total, outputs = len(call.sequences), dict(call.ended())
        try:
            with sample_progress(progress) as bar:
                task = bar.add_task("", total=total, rate=0.0)
                while not call.is_done:
                    self.step()
                    outputs.update(call.ended())
                    if progress:
                        done = total - call.num_unfinished
                        bar.update(task, completed=done, rate=self.rate.recent)
        finally:
            self.release(call)
        return [outputs[i] for i in range(len(outputs))]

    def _check_ready(self) -> None:
        if not self._awake:
            raise RuntimeError("the engine sleeps: call wake() first")
        if not self.has_weights:
            raise RuntimeError(
                "the engine has no weights since it slept, or since an update failed: "
                "call update_weights()"
            )

    def _check_idle(self, action: str) -> None:
        if self.scheduler.has_work:
            raise RuntimeError(f"{action} while samples are in progress: finish or abort them")

    def _take_weights(self, decoder: Decoder) -> None:
        decoder.pack(batch_invariant=self.batch_invariant)
        self.runner.decoder = decoder

    def _drop_weights(self) -> None:
        """Leaves a decoder without memory, and forgets what the old one computed."""
        self.runner.decoder = empty_decoder(self.config, self.dtype, "meta")
        self.pool.clear()

    def _launch(self) -> tuple[Plan, Launched] | None:
        """Starts the next step, if there is anything to compute."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return None
        launched = self.runner.run(plan)
        self.scheduler.commit(plan)
        return plan, launched

    def _read(self) -> list[Sequence]:
        """Takes the tokens of the launched step, moves phases on, and ends what has ended."""
        if self._launched is None:
            return []
        (plan, launched), self._launched = self._launched, None
        drawn = launched.read()
        advanced, ended = list[Sequence](), list[Sequence]()
        for i, (sequence, _) in enumerate(plan.samplers):
            if sequence.finish_reason is not None:
                continue  # it ended while this step was under way
            if not drawn.valid[i]:
                raise FloatingPointError(
                    f"the logits of sample uid {sequence.uid} are not finite (weight version "
                    f"{self.weight_version}): the weights or their update are broken"
                )
            token, soft, override = drawn.token[i], drawn.soft[i], sequence.forced_token
            if override is not None:
                self.runner.force(sequence, override)
                token, soft = override, False
            entropy = drawn.entropy[i] if drawn.entropy else None
            if sequence.advance(token, soft, entropy) != soft:
                self.runner.set_soft_phase(sequence)
            advanced.append(sequence)
            sequence.finish_reason = finish_reason(sequence, self.tokenizer)
            if sequence.finish_reason is not None:
                ended.append(sequence)
        self._end(ended)
        return advanced

    def _abort(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            sequence.finish_reason = "abort"
        self._end(sequences)

    def _end(self, sequences: Seq[Sequence]) -> None:
        """Gives sequences their samples, all with one read, and takes them out."""
        for sequence, sample in zip(sequences, self._samples(sequences), strict=True):
            sequence.sample = sample
            self.scheduler.abort(sequence)

    def _samples(self, sequences: Seq[Sequence]) -> list[Sample]:
        pairs = zip(sequences, self.runner.record.soft_tokens(sequences), strict=True)
        return [as_sample(sequence, *record, self.tokenizer) for sequence, record in pairs]
