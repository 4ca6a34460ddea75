"""The scheduler without a model: random traffic, with every page accounted for after each step."""

import random

import pytest

from softgrpo_engine.kv_cache import PAGE_SIZE, BlockPool
from softgrpo_engine.params import SamplingParams
from softgrpo_engine.scheduler import Scheduler
from softgrpo_engine.sequence import Sequence, pages_for


def sequences(group, prompt, n, max_tokens=8):
    params = SamplingParams(max_tokens=max_tokens)
    return [
        Sequence(
            uid=100 * group + i,
            seed=0,
            stream=0,
            group=group,
            prompt=prompt,
            params=params,
            soft=None,
            end_ids=frozenset(),
            thinking_end=None,
        )
        for i in range(n)
    ]


def check_plan(scheduler, plan, budget):
    assert sum(chunk.length for chunk in plan.chunks) <= budget
    assert len({chunk.sequence.uid for chunk in plan.chunks}) == len(plan.chunks)
    running = {sequence.uid for sequence in scheduler.running}
    rows = [sequence.row for sequence in scheduler.running]
    assert None not in rows
    assert len(set(rows)) == len(rows)
    written = set()
    for chunk in plan.chunks:
        sequence = chunk.sequence
        assert sequence.uid in running
        assert chunk.length > 0
        assert chunk.start == sequence.num_computed
        assert pages_for(chunk.start + chunk.length) <= len(sequence.pages)
        for position in range(chunk.start, chunk.start + chunk.length):
            slot = (sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE)
            assert slot not in written, "two sequences write one slot"
            written.add(slot)
    for sequence, index in plan.samplers:
        chunk = plan.chunks[index]
        assert sequence.uid in running
        assert chunk.start + chunk.length == chunk.sequence.length
        assert chunk.sequence.prompt == sequence.prompt
    scheduler.check()


def finish_done(scheduler, plan):
    for sequence, _ in plan.samplers:
        if sequence.num_generated == sequence.params.max_tokens:
            scheduler.finish(sequence)


def test_a_group_computes_its_prompt_once():
    scheduler = Scheduler(BlockPool(64), max_batch_size=8, max_batch_tokens=64)
    for sequence in sequences(1, list(range(20)), n=6):
        scheduler.add(sequence)
    plan = scheduler.schedule()
    check_plan(scheduler, plan, 64)
    assert [(chunk.start, chunk.length) for chunk in plan.chunks] == [(0, 20)]
    assert [index for _, index in plan.samplers] == [0] * 6
    assert len(plan.copies) == 5  # 20 tokens: one shared page, one copied
    assert scheduler.prompt_tokens == 20
    assert len({sequence.pages[0] for sequence, _ in plan.samplers}) == 1
    assert len({sequence.pages[1] for sequence, _ in plan.samplers}) == 6


def test_siblings_that_do_not_fit_come_later_through_the_prefix_cache():
    scheduler = Scheduler(BlockPool(64), max_batch_size=2, max_batch_tokens=64)
    for sequence in sequences(1, list(range(36)), n=4, max_tokens=2):
        scheduler.add(sequence)
    while scheduler.has_work:
        plan = scheduler.schedule()
        check_plan(scheduler, plan, 64)
        scheduler.commit(plan)
        finish_done(scheduler, plan)
    # The third of the group finds 32 of the 36 in the cache, the fourth takes over all of them.
    assert scheduler.prompt_tokens == 36 + 4
    assert scheduler.prefix_tokens == 36 + 32 + 36
    assert scheduler.pool.num_free == 64


def test_a_long_prompt_is_computed_in_chunks_beside_decoding():
    scheduler = Scheduler(BlockPool(64), max_batch_size=4, max_batch_tokens=16)
    short, long = sequences(1, [1, 2, 3], n=1), sequences(2, list(range(40)), n=2)
    for sequence in short + long:
        scheduler.add(sequence)
    lengths = []
    for _ in range(4):
        plan = scheduler.schedule()
        check_plan(scheduler, plan, 16)
        scheduler.commit(plan)
        lengths.append([chunk.length for chunk in plan.chunks])
    assert lengths == [[3, 13], [1, 15], [1, 12], [1, 1, 1]]


def test_preempted_sequences_keep_their_row_and_go_first():
    scheduler = Scheduler(BlockPool(4), max_batch_size=4, max_batch_tokens=64)
    first, second, third = (sequences(i, [i] * 16, 1, max_tokens=40)[0] for i in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    scheduler.commit(scheduler.schedule())
    rows = [sequence.row for sequence in (first, second)]
    while scheduler.preemptions == 0:
        scheduler.commit(scheduler.schedule())
    assert first in scheduler.running
    assert [first.row, second.row] == rows
    preempted = scheduler.waiting[0]
    assert preempted.num_generated > 0
    assert preempted.pages == []


def walk(seed):
    rng = random.Random(seed)
    pages, batch, budget = rng.randint(5, 20), rng.randint(1, 6), rng.randint(1, 40)
    scheduler = Scheduler(BlockPool(pages), max_batch_size=batch, max_batch_tokens=budget)
    alive, group, steps = [], 0, 0
    common = [rng.randrange(4) for _ in range(48)]
    while group < 12 or scheduler.has_work:
        if group < 12 and (rng.random() < 0.3 or not scheduler.has_work):
            group += 1
            prompt = common[: rng.randint(1, 48)] + [rng.randrange(4)] * rng.randint(0, 3)
            limit = min(20, pages * PAGE_SIZE - len(prompt))
            new = sequences(group, prompt, rng.randint(1, 5), max_tokens=rng.randint(1, limit))
            alive += new
            for sequence in new:
                scheduler.add(sequence)
        plan = scheduler.schedule()
        check_plan(scheduler, plan, budget)
        assert plan.chunks, "no progress although there is work"
        scheduler.commit(plan)
        finish_done(scheduler, plan)
        alive = [s for s in alive if s.num_generated < s.params.max_tokens]
        if alive and rng.random() < 0.05:
            scheduler.abort(alive.pop(rng.randrange(len(alive))))
        if rng.random() < 0.02:
            # The pool forgets what is cached at any time, as an update of the weights makes it.
            scheduler.pool.clear()
        scheduler.check()
        steps += 1
        assert steps < 10000
    assert scheduler.pool.num_free == pages
    assert sorted(scheduler._rows) == list(range(batch))
    assert not alive
    return scheduler.preemptions


@pytest.mark.parametrize("block", range(4))
def test_random_traffic_loses_no_page_and_always_ends(block):
    preemptions = sum(walk(1000 * block + seed) for seed in range(100))
    assert preemptions > 0, "the walk never ran out of pages: it tests nothing"
