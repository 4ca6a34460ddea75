"""Which samples are computed together, and by which process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softgrpo.config import Config, ConfigError
from softgrpo.distributed import World
from softgrpo.rollout.batch import RolloutBatch


def check_budget(config: Config, longest_prompt: int) -> None:
    """Raises ConfigError unless a pass takes the longest sample that a rollout can have."""
    budget, answer = config.optim.tokens_per_microbatch, config.rollout.max_new_tokens
    if budget < longest_prompt + answer:
        raise ConfigError(
            f"optim.tokens_per_microbatch={budget} is less than one sample: the longest prompt has "
            f"{longest_prompt} tokens and rollout.max_new_tokens={answer} may follow; set "
            f"optim.tokens_per_microbatch={longest_prompt + answer} or more"
        )


def microbatches(
    batch: RolloutBatch, samples: Sequence[int], budget: int, world: World
) -> list[list[int]]:
    """The samples of each pass of this process, of packed tokens within the budget. All processes
    have as many passes, some of which may be empty."""
    parts = balanced(
        batch.response_lens[samples].tolist(),
        budget,
        world.size,
        batch.group[samples].tolist(),
        batch.prompt_lens.tolist(),
    )
    return [[samples[i] for i in part] for part in parts[world.rank :: world.size]]


def balanced(
    tokens: Sequence[int],
    budget: int,
    ranks: int,
    prompt_of: Sequence[int] | None = None,
    prompt_tokens: Sequence[int] | None = None,
) -> list[list[int]]:
    """Which samples each pass of each process computes: entry p * ranks + r, possibly empty.

    tokens: of each sample [S], without its prompt. prompt_of, prompt_tokens: the prompt of each
    sample [S], and the tokens of each prompt, which a part has once; None: they have none.

    In as few passes as keep each within the budget, or within the longest sample if that is more.
    The parts are packed longest sample first, and the least capacity that they can all have is
    found by bisection to half a percent, as MULTIFIT does (Coffman, Garey and Johnson 1978). The
    largest parts come in the first pass: a pass is as long as the longest of its processes. 512
    samples take 0.05 s, in hundreds of passes 0.3 s.
    """
    if prompt_of is None or prompt_tokens is None:
        prompt_of, prompt_tokens = range(len(tokens)), [0] * len(tokens)
    longest = max(t + prompt_tokens[p] for t, p in zip(tokens, prompt_of, strict=True))
    total = sum(tokens) + sum(prompt_tokens[p] for p in set(prompt_of))
    capacity = max(budget, longest)
    passes = max(1, -(-total // (capacity * ranks)))
    while (parts := _packed(tokens, prompt_of, prompt_tokens, capacity, passes * ranks)) is None:
        passes += 1
    too_small = max(longest, -(-total // (passes * ranks))) - 1
    while capacity - too_small > 1 + capacity // 200:
        middle = (capacity + too_small) // 2
        packed = _packed(tokens, prompt_of, prompt_tokens, middle, passes * ranks)
        if packed is None:
            too_small = middle
        else:
            parts, capacity = packed, middle
    return parts


def _packed(
    tokens: Sequence[int],
    prompt_of: Sequence[int],
    prompt_tokens: Sequence[int],
    capacity: int,
    count: int,
) -> list[list[int]] | None:
    """So many parts, largest first, none over the capacity; None where a sample finds no room.

    Longest first, a sample goes where its prompt is already, else to the part that stays smallest.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    sizes = np.zeros(count, dtype=np.int64)
    has_prompt = np.zeros((len(prompt_tokens), count), dtype=bool)
    for sample in sorted(range(len(tokens)), key=lambda sample: -tokens[sample]):
        there = has_prompt[prompt_of[sample]]
        grown = sizes + tokens[sample] + np.where(there, 0, prompt_tokens[prompt_of[sample]])
        # What fits is at most the capacity; less than 0 it comes before all others.
        preference = np.where((grown <= capacity) & there, grown - capacity - 1, grown)
        best = int(preference.argmin())
        if grown[best] > capacity:
            return None
        parts[best].append(sample)
        sizes[best] = grown[best]
        there[best] = True
    return [sorted(parts[i]) for i in np.argsort(-sizes, kind="stable")]
