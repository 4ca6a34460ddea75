"""The engine: continuous batching of soft and discrete samples over a paged KV cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer

from softgrpo_engine.kv_cache import BlockPool
from softgrpo_engine.memory import pages_that_fit
from softgrpo_engine.model import Decoder
from softgrpo_engine.model_source import resolve_model
from softgrpo_engine.outputs import Output, Sample
from softgrpo_engine.params import K_MAX, SamplingParams, SoftParams
from softgrpo_engine.prompts import Prompt, as_list, default_uids, encode, thinking_end_id
from softgrpo_engine.runner import Drawn, Runner
from softgrpo_engine.scheduler import Plan, Scheduler
from softgrpo_engine.sequence import Sequence, pages_for
from softgrpo_engine.stopping import hits_stop_string, sample_text
from softgrpo_engine.weights import load_decoder, load_weights

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LLM:
    """Batch generation with soft tokens.

        llm = LLM("smollm2-135m")
        outputs = llm.generate("What is 2 + 3?", SamplingParams(n=4), SoftParams())

    model: hub id, local directory, alias, or a Decoder with its tokenizer. dtype: "bfloat16" or
    "float32". kv_memory: GiB of KV cache; by default what max_batch_size samples of max_model_len
    need, at most a quarter of the free memory. max_model_len: tokens of prompt and answer, by
    default what the model was made for. max_batch_size: samples in progress at once.
    max_batch_tokens: positions computed in one step; longer prompts are computed in chunks.
    batch_invariant: a sample has the same bits whatever it shares a batch with, on any CPU; where
    the CPU has a matrix unit for bfloat16 that is so in any case.
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
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is not allowed: must be bfloat16 or float32")
        for name, value in (("size", max_batch_size), ("tokens", max_batch_tokens)):
            if value < 1:
                raise ValueError(f"max_batch_{name}={value} is not allowed: must be >= 1")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model_path: Path | None = None
        if isinstance(model, Decoder):
            decoder = model
        else:
            self.model_path = resolve_model(str(model))
            decoder = load_decoder(self.model_path, _DTYPES[dtype], device)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(self.model_path))
        self.batch_invariant = batch_invariant
        decoder.pack(batch_invariant=batch_invariant)
        self.tokenizer = tokenizer
        self.config = decoder.config
        self.max_model_len = max_model_len or self.config.max_position_embeddings
        if self.max_model_len > self.config.max_position_embeddings:
            raise ValueError(
                f"max_model_len={max_model_len} is more than the model's "
                f"{self.config.max_position_embeddings}: shorten the prompts or the answers"
            )
        self.default_soft = SoftParams.of_model(self.model_path) if self.model_path else None
        self.weight_version = 0
        num_pages = pages_that_fit(decoder, kv_memory, max_batch_size, self.max_model_len)
        self.pool = BlockPool(num_pages)
        self.scheduler = Scheduler(self.pool, max_batch_size, max_batch_tokens)
        self.runner = Runner(decoder, num_pages, max_batch_size)
        self.device = self.runner.device
        self.generated_tokens = 0
        self._groups = 0
        self._awake = True
        self._samples: dict[Sequence, Sample] = {}

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
        params = params or SamplingParams()
        ids = [encode(prompt, self.tokenizer) for prompt in as_list(prompts)]
        uids = [default_uids(prompt, params.n) for prompt in ids]
        seed = _seed(params)
        return self.generate_groups(ids, params, soft, seed=seed, uids=uids, progress=progress)

    def generate_groups(
        self,
        prompts: Seq[list[int]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        uids: Seq[Seq[int]],
        stream: int = 0,
        progress: bool = False,
    ) -> list[Output]:
        """Samples prompt i once for each uid of ``uids[i]``; a group computes its prompt once.

        A sample is a function of (weights, prompt, seed, stream, uid, parameters), up to the
        rounding of the GEMM; what it shares a batch with does not matter.
        """
        outputs = dict(self.iter_groups(prompts, params, soft, seed, uids, stream, progress))
        return [outputs[i] for i in range(len(prompts))]

    def iter_groups(
        self,
        prompts: Seq[list[int]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None,
        seed: int,
        uids: Seq[Seq[int]],
        stream: int = 0,
        progress: bool = False,
    ) -> Iterator[tuple[int, Output]]:
        """Like ``generate_groups``; yields (prompt index, Output) as soon as a group has ended."""
        groups = dict(enumerate(self._add(prompts, params, soft, seed, uids, stream)))
        sequences = [s for group in groups.values() for s in group]
        try:
            with Progress(
                console=Console(stderr=True), disable=not progress, transient=True
            ) as bar:
                task = bar.add_task("generating", total=len(sequences))
                while groups:
                    for i in [i for i, g in groups.items() if all(s.finish_reason for s in g)]:
                        samples = [self._samples.pop(s) for s in groups.pop(i)]
                        yield i, Output(list(prompts[i]), samples)
                    if groups:
                        bar.advance(task, sum(s.finish_reason is not None for s in self.step()))
        finally:
            self._forget(sequences)

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
        soft: SoftParams | Literal[False] | None = None,
    ) -> Iterator[tuple[int, Sample]]:
        """Yields (prompt index, the sample so far) for each new token, and once when it has ended.

        Streams may be read in turns: all that is in progress shares the steps.
        """
        params = params or SamplingParams()
        ids = [encode(prompt, self.tokenizer) for prompt in as_list(prompts)]
        uids = [default_uids(prompt, params.n) for prompt in ids]
        groups = self._add(ids, params, soft, _seed(params), uids, stream=0)
        index = {sequence: i for i, group in enumerate(groups) for sequence in group}
        shown = dict.fromkeys(index, 0)
        try:
            while shown:
                news = [s for s in shown if s.finish_reason or s.num_generated > shown[s]]
                if not news:
                    self.step()
                for sequence in news:
                    shown[sequence] = sequence.num_generated
                    if sequence.finish_reason:
                        del shown[sequence]
                    yield index[sequence], self._samples.get(sequence) or self._sample(sequence)
        finally:
            self._forget(list(index))

    def step(self) -> list[Sequence]:
        """One step: plan, compute, draw, commit. Returns the sequences that got a token."""
        plan = self.scheduler.schedule()
        for sequence in plan.started:
            self.runner.start(sequence)
        try:
            drawn = self.runner.run(plan)
            self._check_valid(plan, drawn)
        except BaseException:
            # Half a step cannot be taken up again: nothing that is in progress goes on.
            for sequence in self.scheduler.active:
                self._end(sequence, "abort")
            raise
        forced = [sequence.forced_token for sequence, _ in plan.samplers]
        self.scheduler.commit(plan)
        return self._advance(plan, drawn, forced)

    def abort(self, uid: int) -> None:
        """Ends the samples of that name; they come back with finish_reason "abort"."""
        for sequence in self.scheduler.active:
            if sequence.uid == uid:
                self._end(sequence, "abort")

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights in place (Hugging Face names, every parameter once).

        Nothing computed with the old weights is used again. The engine must be idle.
        """
        if self.scheduler.has_work:
            raise RuntimeError("update_weights while samples are in progress: finish or abort them")
        load_weights(self.runner.decoder, iter(named_tensors))
        self.runner.decoder.pack(batch_invariant=self.batch_invariant)
        self.pool.clear()
        self.weight_version = version

    def sleep(self) -> None:
        """Frees the KV cache until ``wake``; the weights stay and can be updated."""
        if self.scheduler.has_work:
            raise RuntimeError("sleep while samples are in progress: finish or abort them")
        self.pool.clear()
        self.runner.free_pages()
        self._awake = False

    def wake(self) -> None:
        """Makes an empty KV cache after ``sleep``."""
        self.runner.allocate_pages()
        self._awake = True

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and what is in progress now."""
        scheduler = self.scheduler
        return {
            "generated_tokens": self.generated_tokens,
            "prompt_tokens_computed": scheduler.prompt_tokens,
            "prefix_tokens_reused": scheduler.prefix_tokens,
            "preemptions": scheduler.preemptions,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_pages": self.pool.num_pages,
            "kv_pages_free": self.pool.num_free,
            "weight_version": self.weight_version,
        }

    def check_fits(self, prompts: Seq[list[int]], params: SamplingParams) -> None:
        """Raises ValueError, naming the prompt, unless every prompt and its answer can fit."""
        for index, prompt in enumerate(prompts):
            longest = len(prompt) + params.max_tokens
            if not prompt:
                raise ValueError(f"prompt {index} is empty")
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                token = next(t for t in prompt if not 0 <= t < self.config.vocab_size)
                raise ValueError(
                    f"prompt {index} has token id {token}, outside the model's vocabulary of "
                    f"{self.config.vocab_size}"
                )
            if longest > self.max_model_len:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_tokens="
                    f"{params.max_tokens} that is {longest}, and the context is "
                    f"{self.max_model_len}: shorten one of them"
                )
            if pages_for(longest) > self.pool.num_pages:
                raise ValueError(
                    f"prompt {index} needs {pages_for(longest)} KV pages for {longest} tokens, "
                    f"and there are {self.pool.num_pages}: raise kv_memory"
                )

    def _add(
        self,
        prompts: Seq[list[int]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None,
        seed: int,
        uids: Seq[Seq[int]],
        stream: int,
    ) -> list[list[Sequence]]:
        """Queues all samples; bad requests are refused before any of them is."""
        if not self._awake:
            raise RuntimeError("the engine sleeps: call wake() first")
        if soft is None:
            soft = self.default_soft
        soft = soft or None
        self.check_fits(prompts, params)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this engine has none")
        if len(uids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and uids for {len(uids)}: one list a prompt")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is not allowed: must be >= 0 and < 2^64")
        bad = [uid for group in uids for uid in group if not 0 <= uid < 2**32]
        if bad:
            raise ValueError(f"uid {bad[0]} is not allowed: must be >= 0 and < 2^32")
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= frozenset(self.config.eos_token_ids)
        thinking_end = thinking_end_id(soft.end_of_thinking, self.tokenizer) if soft else None
        if thinking_end is not None and not 0 <= thinking_end < self.config.vocab_size:
            raise ValueError(f"end_of_thinking={thinking_end} is outside the model's vocabulary")
        # A discrete position keeps its candidates where there are at most K_MAX of them.
        discrete_slots = params.top_k if 1 <= params.top_k <= K_MAX else 1
        slots = max(discrete_slots, soft.top_k if soft else 1)
        self.runner.record.reserve(params.max_tokens, slots)
        groups = []
        for prompt, group_uids in zip(prompts, uids, strict=True):
            self._groups += 1
            group = [
                Sequence(
                    uid=uid,
                    seed=seed,
                    stream=stream,
                    group=self._groups,
                    prompt=list(prompt),
                    params=params,
                    soft=soft,
                    end_ids=end_ids,
                    thinking_end=thinking_end,
                    slots=slots,
                    soft_phase=soft is not None,
                )
                for uid in group_uids
            ]
            groups.append(group)
        for group in groups:
            for sequence in group:
                self.scheduler.add(sequence)
        return groups

    def _check_valid(self, plan: Plan, drawn: Drawn) -> None:
        if not all(drawn.valid):
            sequence, _ = plan.samplers[drawn.valid.index(False)]
            raise RuntimeError(
                f"the logits of sample uid {sequence.uid} are not finite "
                f"(weight version {self.weight_version}): the weights or their update are broken"
            )

    def _advance(self, plan: Plan, drawn: Drawn, forced: list[int | None]) -> list[Sequence]:
        """Reads the drawn tokens, moves phases on, and ends what has ended."""
        advanced = []
        for i, (sequence, _) in enumerate(plan.samplers):
            token, soft, override = drawn.token[i], drawn.soft[i], forced[i]
            if override is not None:
                self.runner.force(sequence, override)
                token, soft = override, False
            sequence.tokens.append(token)
            sequence.soft_phase = soft and self._within_budget(sequence)
            self.generated_tokens += 1
            advanced.append(sequence)
            if token in sequence.end_ids or hits_stop_string(sequence, self.tokenizer):
                self._end(sequence, "stop")
            elif sequence.num_generated == sequence.params.max_tokens:
                self._end(sequence, "length")
        return advanced

    def _within_budget(self, sequence: Sequence) -> bool:
        """Without an end-of-thinking token a spent budget simply makes the rest discrete."""
        assert sequence.soft is not None
        budget = sequence.soft.max_soft_tokens
        if budget is None or sequence.thinking_end is not None or sequence.num_generated < budget:
            return True
        self.runner.end_soft_phase(sequence)
        return False

    def _end(self, sequence: Sequence, reason: Literal["stop", "length", "abort"]) -> None:
        sequence.finish_reason = reason
        self._samples[sequence] = self._sample(sequence)
        self.scheduler.abort(sequence)

    def _sample(self, sequence: Sequence) -> Sample:
        soft, logprobs = self.runner.record.soft_tokens(sequence)
        return Sample(
            text=sample_text(sequence, self.tokenizer),
            token_ids=list(sequence.tokens),
            logprobs=logprobs,
            soft=soft,
            finish_reason=sequence.finish_reason,
            uid=sequence.uid,
        )

    def _forget(self, sequences: list[Sequence]) -> None:
        """Leaves nothing behind, also after an error or a stream that was not read to its end."""
        for sequence in sequences:
            if sequence.finish_reason is None:
                self._end(sequence, "abort")
            self._samples.pop(sequence, None)
        if not self.scheduler.has_work:
            self.scheduler.check()


def _seed(params: SamplingParams) -> int:
    return params.seed if params.seed is not None else secrets.randbits(63)
