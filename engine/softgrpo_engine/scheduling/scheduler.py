"""Who computes what in the next step. No torch here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE, BlockPool
from softgrpo_engine.scheduling.sequence import Sequence, pages_for


@dataclass(frozen=True)
class Chunk:
    """Positions ``start : start + length`` of a sequence are computed in this step."""

    sequence: Sequence
    start: int
    length: int


@dataclass
class Plan:
    """One step.

    chunks: what is computed. samplers: (sequence, index of the chunk whose last position gives its
    logits); the samples of a group share the chunk of their prompt. copies: (from page, to page)
    after the forward pass, the unfilled last page of a shared prompt. started: sequences that got
    their row of the record in this step.
    """

    chunks: list[Chunk] = field(default_factory=list)
    samplers: list[tuple[Sequence, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """Every sequence computes the one position after its last new token."""
        return bool(self.chunks) and all(
            len(c.sequence.prompt) <= c.start == c.sequence.length - 1 for c in self.chunks
        )


class Scheduler:
    """Continuous batching: running sequences first, then new ones, within a token budget a step.

    max_batch_size: samples that hold a row of the record at once. max_batch_tokens: positions
    computed in one step. When no page is free the youngest running sequence gives up its pages and
    is computed again later, from its record. A sequence is admitted when the running ones can each
    take one more page after it, so that it is not thrown out again at once.

    A long prompt never holds up decoding: there are no more running sequences than positions in a
    step, and only the youngest can be in the middle of its prompt (admission ends where the budget
    does), so that all others get their one position before it gets what is left.
    """

    def __init__(self, pool: BlockPool, max_batch_size: int, max_batch_tokens: int) -> None:
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_tokens = 0
        self.prompt_tokens = 0
        self._rows = list(range(max_batch_size - 1, -1, -1))
        self._is_checked = True  # no sequence came since the pages were last accounted for

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def has_room(self) -> bool:
        """Whether one more prompt could start in the next step, beside all that is here."""
        followers = sum(len(leader.followers) for leader in self.running)
        prompts = {s.group: s for s in self.waiting}.values()  # siblings share theirs
        tokens = sum(s.length - s.num_computed for s in (*self.running, *prompts))
        pages = len(self.running) + len(self.waiting) + sum(pages_for(s.length) for s in prompts)
        return (
            followers + len(self.waiting) < len(self._rows)
            and tokens < self.max_batch_tokens
            and pages < self.pool.num_free
        )

    @property
    def active(self) -> list[Sequence]:
        """All that is in progress, a copy."""
        followers = [sibling for leader in self.running for sibling in leader.followers]
        return [*self.running, *followers, *self.waiting]

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._is_checked = False

    def schedule(self) -> Plan:
        """Plans the next step. Pages and rows are taken here, results come with ``commit``."""
        plan = Plan()
        budget = self._continue_running(plan)
        self._admit(plan, budget)
        return plan

    def commit(self, plan: Plan) -> None:
        """The plan was computed: every sampler has one more position."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.start + chunk.length
            if chunk.start < len(sequence.prompt) <= sequence.num_computed:
                self.pool.cache_prefix(sequence.prompt, sequence.pages)
        for sequence, _ in plan.samplers:
            sequence.num_generated += 1

    def finish(self, sequence: Sequence) -> None:
        """Takes a running sequence out; its pages and its row are free."""
        self.running.remove(sequence)
        self._release(sequence)
        self._return_row(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is."""
        if sequence in self.running:
            self.finish(sequence)
            return
        for leader in self.running:
            if sequence in leader.followers:
                leader.followers.remove(sequence)
                return
        self.waiting.remove(sequence)
        self._return_row(sequence)

    def check(self) -> None:
        """Raises RuntimeError when a page or a row is lost or held twice."""
        self.pool.check(sequence.pages for sequence in [*self.running, *self.waiting])

    def check_when_idle(self) -> None:
        """`check`, once after each burst of sequences."""
        if not (self._is_checked or self.has_work):
            self.check()
            self._is_checked = True

    def _continue_running(self, plan: Plan) -> int:
        budget = self.max_batch_tokens
        index = 0
        # Oldest first. Only younger sequences, not yet planned, are preempted on the way.
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            if sequence.is_drawn:
                index += 1
            elif self._grow(sequence):
                budget -= self._chunk(plan, sequence, budget)
                index += 1
        for sequence, chunk in list(plan.samplers):
            if sequence.followers:
                self._fork(plan, sequence, chunk)
        return budget

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for the whole length, taken from younger sequences if need be."""
        missing = pages_for(sequence.length) - len(sequence.pages)
        while missing > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages.extend(self.pool.allocate() for _ in range(missing))
        return True

    def _admit(self, plan: Plan, budget: int) -> None:
        # A step has room for a token of everything that runs.
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_tokens:
            sequence = self.waiting[0]
            if sequence.is_drawn or (sequence.row is None and not self._rows):
                return
            # At least one position is computed: it gives the logits.
            reusable = 0 if sequence.scores_prompt else sequence.length - 1
            prefix = self.pool.find_prefix(sequence.prompt[:reusable])
            for page in prefix:
                self.pool.share(page)
            missing = pages_for(sequence.length) - len(prefix)
            if missing + len(self.running) > self.pool.num_free:
                self.pool.release(prefix)
                return
            self.waiting.popleft()
            sequence.pages = prefix + [self.pool.allocate() for _ in range(missing)]
            sequence.num_computed = len(prefix) * PAGE_SIZE
            self.prefix_tokens += sequence.num_computed
            if sequence.row is None:
                sequence.row = self._rows.pop()
                plan.started.append(sequence)
            self.running.append(sequence)
            if sequence.num_generated == 0:
                self._gather_followers(sequence)
            budget -= self._chunk(plan, sequence, budget)
            if plan.samplers and plan.samplers[-1][0] is sequence:
                self._fork(plan, *plan.samplers[-1])

    def _gather_followers(self, leader: Sequence) -> None:
        """The siblings next in the queue wait for the leader's prompt instead of computing it."""
        while self.waiting and self.waiting[0].group == leader.group and self.waiting[0].is_fresh:
            leader.followers.append(self.waiting.popleft())

    def _chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        length = min(sequence.length - sequence.num_computed, budget)
        index = len(plan.chunks)
        plan.chunks.append(Chunk(sequence, sequence.num_computed, length))
        self.prompt_tokens += max(0, min(length, len(sequence.prompt) - sequence.num_computed))
        if sequence.num_computed + length == sequence.length:
            plan.samplers.append((sequence, index))
        return length

    def _fork(self, plan: Plan, leader: Sequence, index: int) -> None:
        """The leader's prompt is complete in this step: its siblings start from it.

        Full pages are shared; the unfilled last one is copied. Siblings that do not fit now go back
        to the queue and find the prompt in the prefix cache.
        """
        full, partial = divmod(len(leader.prompt), PAGE_SIZE)
        while (
            leader.followers
            and self._rows
            and len(self.running) < min(self.pool.num_free, self.max_batch_tokens)
        ):
            sibling = leader.followers.pop(0)
            sibling.row = self._rows.pop()
            plan.started.append(sibling)
            sibling.pages = list(leader.pages[:full])
            for page in sibling.pages:
                self.pool.share(page)
            if partial:
                sibling.pages.append(self.pool.allocate())
                plan.copies.append((leader.pages[full], sibling.pages[full]))
            sibling.num_computed = len(sibling.prompt)
            self.prefix_tokens += len(sibling.prompt)
            self.running.append(sibling)
            plan.samplers.append((sibling, index))
        self._return_followers(leader)

    def _return_followers(self, leader: Sequence) -> None:
        self.waiting.extendleft(reversed(leader.followers))
        leader.followers.clear()

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        sequence.prompt_parts.clear()
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._return_followers(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0

    def _return_row(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._rows.append(sequence.row)
            sequence.row = None
