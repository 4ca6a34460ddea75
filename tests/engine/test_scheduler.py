"""The scheduler without a model: random traffic, with every page accounted for after each step."""

from collections import Counter

from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import booleans, integers, sampled_from

from softgrpo_engine.params import SamplingParams
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE, BlockPool
from softgrpo_engine.scheduling.scheduler import Scheduler
from softgrpo_engine.scheduling.sequence import Sequence, pages_for


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


def test_siblings_join_only_as_far_as_a_step_reaches():
    """More running samples than positions in a step, and the last ones would never get theirs."""
    scheduler = Scheduler(BlockPool(64), max_batch_size=8, max_batch_tokens=3)
    for sequence in sequences(1, [1, 2, 3], n=6):
        scheduler.add(sequence)
    scheduler.commit(scheduler.schedule())
    assert len(scheduler.running) == 3
    plan = scheduler.schedule()
    check_plan(scheduler, plan, 3)
    assert [chunk.sequence for chunk in plan.chunks] == scheduler.running


# Operations, and what they have met, over all runs of the machine.
SEEN: Counter[str] = Counter()


class Traffic(RuleBasedStateMachine):
    """Any operation at any time. Every page has contents here: what a sequence reads must be what
    it would have computed itself, under the weights of now."""

    @initialize(pages=integers(4, 8), rows=integers(2, 6), budget=sampled_from([2, 3, 7, 20]))
    def start(self, pages, rows, budget):
        self.pages, self.rows, self.budget = pages, rows, budget
        self.scheduler = Scheduler(BlockPool(pages), rows, budget)
        self.slots = {}  # (page, offset) -> what was computed there
        self.alive, self.groups, self.version = [], 0, 0

    def history(self, sequence, position):
        """Keys and values hang on all that stands before: the prompt, then this sample's draws."""
        prompt = sequence.prompt
        if position < len(prompt):
            return self.version, tuple(prompt[: position + 1])
        return self.version, tuple(prompt), sequence.uid, position

    def contents(self, sequence, length):
        pages = sequence.pages
        return [self.slots.get((pages[i // PAGE_SIZE], i % PAGE_SIZE)) for i in range(length)]

    def check_contents(self, sequence, length):
        expected = [self.history(sequence, i) for i in range(length)]
        assert self.contents(sequence, length) == expected

    @rule(family=integers(0, 1), length=integers(1, 40), n=integers(1, 4), answer=integers(1, 40))
    def add(self, family, length, n, answer):
        """Prompts of a family start alike."""
        self.groups += 1
        length = min(length, self.pages * PAGE_SIZE - answer)
        prompt = [family] * (length - length % 3) + [self.groups] * (length % 3)
        for sequence in sequences(self.groups, prompt, n, answer):
            self.scheduler.add(sequence)
            self.alive.append(sequence)
        SEEN["add"] += 1

    @precondition(lambda self: self.alive)
    @rule(choice=integers(0, 10**6))
    def abort(self, choice):
        self.take_out(self.alive[choice % len(self.alive)])

    @precondition(lambda self: self.alive)
    @rule(preempted=booleans())
    def abort_a_rare_one(self, preempted):
        """The next that is preempted, or whose siblings wait for its prompt."""
        for _ in range(100):
            rare = [s for s in self.scheduler.waiting if s.row is not None]
            if not preempted:
                rare = [s for s in self.scheduler.running if s.followers]
            if rare:
                self.take_out(rare[0])
                return
            self.step()

    def take_out(self, sequence):
        running = sequence in self.scheduler.running
        where = "running" if running else "preempted" if sequence.row is not None else "waiting"
        where = "leading" if sequence.followers else where
        SEEN[f"abort of a {where} one"] += 1
        self.scheduler.abort(sequence)
        self.alive.remove(sequence)

    @precondition(lambda self: any(s.num_generated for s in self.scheduler.running))
    @rule(choice=integers(0, 10**6))
    def finish(self, choice):
        """An end that nobody foresaw, as EOS."""
        begun = [s for s in self.scheduler.running if s.num_generated]
        self.end(begun[choice % len(begun)])
        SEEN["finish"] += 1

    @precondition(lambda self: self.groups)
    @rule()
    def update_weights(self):
        """Prefixes are forgotten at any time; the weights themselves change when nothing runs."""
        self.scheduler.pool.clear()
        idle = not self.scheduler.has_work
        self.version += idle
        SEEN["update" if idle else "clear"] += 1

    @precondition(lambda self: self.alive)
    @rule(times=integers(1, 20))
    def steps(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        scheduler = self.scheduler
        if not scheduler.has_work:
            return
        SEEN["step"] += 1
        before = (scheduler.preemptions, scheduler.prefix_tokens)
        decoding = [s for s in scheduler.running if s.num_computed == s.length - 1]
        plan = scheduler.schedule()
        assert plan.chunks, "no progress although there is work"
        check_plan(scheduler, plan, self.budget)
        planned = [chunk.sequence for chunk in plan.chunks]
        assert all(s in planned for s in decoding if s in scheduler.running), "decoding starves"
        for chunk in plan.chunks:
            for i in range(chunk.start, chunk.start + chunk.length):
                page = chunk.sequence.pages[i // PAGE_SIZE]
                self.slots[page, i % PAGE_SIZE] = self.history(chunk.sequence, i)
        for chunk in plan.chunks:
            self.check_contents(chunk.sequence, chunk.start + chunk.length)
        for source, target in plan.copies:
            for i in range(PAGE_SIZE):
                self.slots[target, i] = self.slots.get((source, i))
        scheduler.commit(plan)
        for sequence in scheduler.running:
            self.check_contents(sequence, sequence.num_computed)
        for sequence, _ in plan.samplers:
            if sequence.num_generated == sequence.params.max_tokens:
                self.end(sequence)
        SEEN["preemption"] += scheduler.preemptions - before[0]
        SEEN["prefix hit"] += scheduler.prefix_tokens > before[1]
        SEEN["fork"] += len(plan.samplers) > len({index for _, index in plan.samplers})
        SEEN["chunk of a prompt"] += any(
            chunk.start + chunk.length < len(chunk.sequence.prompt) for chunk in plan.chunks
        )

    def end(self, sequence):
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)

    @invariant()
    def every_page_and_row_is_accounted_for(self):
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.pool
        scheduler.check()
        assert sorted(s.uid for s in scheduler.active) == sorted(s.uid for s in self.alive)
        rows = [s.row for s in self.alive if s.row is not None]
        assert sorted([*rows, *scheduler._rows]) == list(range(self.rows))
        held = Counter(page for s in self.alive for page in s.pages)
        assert [held[page] for page in range(self.pages)] == pool._references
        assert not {*pool._free, *pool._idle} & set(held)
        assert sorted([*pool._free, *pool._idle, *held]) == list(range(self.pages))
        assert all(not s.pages for s in self.alive if s not in scheduler.running)

    def teardown(self):
        """Everything that was admitted comes to its end, and leaves nothing behind."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            self.step()
        assert not self.alive
        assert not self.scheduler.has_work
        self.every_page_and_row_is_accounted_for()
        assert self.scheduler.pool.num_free == self.pages


def test_any_traffic_reads_only_its_own_history_loses_no_page_and_always_ends():
    SEEN.clear()
    few = settings(max_examples=60, stateful_step_count=50, derandomize=True, deadline=None)
    run_state_machine_as_test(Traffic, settings=few)
    assert sum(SEEN.values()) > 2000
    for event in (
        "preemption",
        "prefix hit",
        "fork",
        "chunk of a prompt",
        "update",
        "finish",
        "abort of a running one",
        "abort of a leading one",
        "abort of a preempted one",
        "abort of a waiting one",
    ):
        assert SEEN[event] >= 5, f"{event}: {SEEN}"
