"""What a caller asked for: whether it can be done, and as which samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from typing import Any

from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.params import K_MAX, SamplingParams, SoftParams
from softgrpo_engine.requests.prompts import thinking_end_id
from softgrpo_engine.scheduling.entropy_rules import entropy_rule
from softgrpo_engine.scheduling.sequence import Sequence, pages_for
from softgrpo_kernels.limits import LAST_STREAM_OF_DRAWS, LAST_WORD
from softgrpo_kernels.methods import DIRICHLET, method_of

_GROUP_NUMBERS = itertools.count()


def check_fits(
    prompts: Seq[list[int]],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    num_pages: int,
) -> None:
    """Raises ValueError, naming the prompt, unless every prompt and its answer can fit."""
    for index, prompt in enumerate(prompts):
        longest = len(prompt) + params.max_tokens
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        _check_ids(f"prompt {index} has token id", prompt, vocab_size)
        if longest > max_model_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_tokens={params.max_tokens} "
                f"that is {longest}, and the context is {max_model_len}: shorten one of them"
            )
        if pages_for(longest) > num_pages:
            raise ValueError(
                f"prompt {index} needs {pages_for(longest)} KV pages for {longest} tokens, "
                f"and there are {num_pages}: raise kv_memory"
            )


def check_sizes(**sizes: int | None) -> None:
    """Raises ValueError for a size, by its name, that is less than 1."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not allowed: must be >= 1")


def check_thoughts_fit(params: SamplingParams, soft: SoftParams | None) -> None:
    """Raises ValueError unless a sample can have as many thoughts as it must have."""
    if soft and soft.min_soft_tokens > params.max_tokens:
        raise ValueError(
            f"min_soft_tokens={soft.min_soft_tokens} is more than max_tokens={params.max_tokens}: "
            "raise max_tokens, which counts the answer too"
        )


def make_groups(
    prompts: Seq[list[int]],
    params: SamplingParams,
    soft: SoftParams | None,
    seed: int,
    uids: Seq[Seq[int]],
    stream: int,
    config: DecoderConfig,
    tokenizer: Any,
) -> list[list[Sequence]]:
    """The samples of each prompt, one for each of its uids.

    Raises ValueError for settings that no step could compute.
    """
    if params.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this engine has none")
    check_thoughts_fit(params, soft)
    thinking_end = thinking_end_id(soft.end_of_thinking, tokenizer) if soft else None
    _check_ids("stop_token_ids has", params.stop_token_ids, config.vocab_size)
    if thinking_end is not None:
        _check_ids("end_of_thinking is", [thinking_end], config.vocab_size)
    if len(uids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and uids for {len(uids)}: one list a prompt")
    check_noise_keys(seed, uids, stream, soft)
    end_ids = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        end_ids |= frozenset(config.eos_token_ids)
    adds_noise = soft is not None and method_of(soft.noise).adds_noise
    embedding_noise = soft.noise_scale if soft and adds_noise else 0.0
    # A discrete position keeps its candidates where there are at most K_MAX of them.
    discrete_slots = params.top_k if 1 <= params.top_k <= K_MAX else 1

    def group(prompt: list[int], uids: Seq[int]) -> list[Sequence]:
        number = next(_GROUP_NUMBERS)
        return [
            Sequence(
                uid=uid,
                seed=seed,
                stream=stream,
                group=number,
                prompt=prompt,
                params=params,
                soft=soft,
                end_ids=end_ids,
                thinking_end=thinking_end,
                slots=max(discrete_slots, soft.top_k if soft else 1),
                soft_phase=soft is not None,
                thinking=soft is not None,
                rule=entropy_rule(soft),
                embedding_noise=embedding_noise,
                # The samples of a group share its prompt: the first computes it.
                scores_prompt=i == 0 and params.prompt_logprobs is not None,
            )
            for i, uid in enumerate(uids)
        ]

    return [group(*pair) for pair in zip(prompts, uids, strict=True)]


def check_noise_keys(seed: int, uids: Seq[Seq[int]], stream: int, soft: SoftParams | None) -> None:
    """Raises ValueError for keys that no noise has: a step would refuse them too, and with it the
    samples of all other callers."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is not allowed: must be >= 0 and < 2^64")
    for uid in itertools.chain.from_iterable(uids):
        if not 0 <= uid <= LAST_WORD:
            raise ValueError(f"uid {uid} is not allowed: must be >= 0 and < 2^32")
    method = method_of(soft.noise) if soft else None
    draws_again = method is not None and (method.adds_noise or method.code >= DIRICHLET)
    last = LAST_STREAM_OF_DRAWS if draws_again else LAST_WORD
    if not 0 <= stream <= last:
        bits = last.bit_length()
        raise ValueError(f"stream {stream} is not allowed: must be >= 0 and < 2^{bits}")


def _check_ids(name: str, ids: Seq[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        token = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"{name} {token}, outside the model's vocabulary of {vocab_size}")
