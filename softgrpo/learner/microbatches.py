"""Which groups are computed together, and by which process."""

from __future__ import annotations

from collections.abc import Sequence

from softgrpo.distributed import World
from softgrpo.rollout.batch import RolloutBatch


def microbatches(
    batch: RolloutBatch, groups: Sequence[int], budget: int, world: World
) -> list[list[int]]:
    """The groups of each pass of this process, of packed tokens within the budget where they can
    be. All processes have as many passes, some of which may be empty."""
    lens = batch.prompt_lens.long().index_add(0, batch.group.long(), batch.response_lens.long())
    parts = balanced([int(lens[g]) for g in groups], budget, world.size)
    return [[groups[i] for i in part] for part in parts[world.rank :: world.size]]


def balanced(tokens: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """Which groups each pass of each process computes: entry p * ranks + r, possibly empty.

    tokens: of each group. Longest first, always to the emptiest pass, in as few passes as keep each
    within the budget; a group is never split, one that is over the budget gets a pass of its own.
    """
    order = sorted(range(len(tokens)), key=lambda group: -tokens[group])
    # No more passes than groups: one that is over the budget leaves none over.
    passes = max(1, min(-(-sum(tokens) // (budget * ranks)), -(-len(tokens) // ranks)))
    while True:
        parts: list[list[int]] = [[] for _ in range(passes * ranks)]
        sizes = [0] * len(parts)
        for group in order:
            emptiest = sizes.index(min(sizes))
            parts[emptiest].append(group)
            sizes[emptiest] += tokens[group]
        fits = all(s <= budget or len(p) == 1 for s, p in zip(sizes, parts, strict=True))
        if fits:
            return [sorted(part) for part in parts]
        passes += 1
