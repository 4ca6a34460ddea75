"""One sample on its way through the engine. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from softgrpo_engine.outputs import FinishReason
from softgrpo_engine.params import SamplingParams, SoftParams
from softgrpo_engine.scheduling.entropy_rules import EntropyRule
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE

if TYPE_CHECKING:
    from softgrpo_engine.outputs import PromptLogprobs, Sample


@dataclass(eq=False)
class Sequence:
    """State of one sample.

    uid, seed, stream: keys of its noise. group: samples of one prompt in one call have the same
    number. end_ids: tokens that end it. thinking_end: token that ends its soft phase, if any.
    slots: candidates recorded at a position. num_generated: positions drawn, the last of which the
    host may not have read yet. num_computed: positions whose keys and values are in ``pages``. row:
    its row in the record, kept while it is preempted. soft_phase: the next position is drawn
    softly. thinking: the end of thinking is still to come; only a rule of entropies makes it differ
    from soft_phase. thinking_over: it is forced at the next position. embedding_noise: scale of the
    noise on its mixtures, 0 without. tokens: those read, for text
    and stop strings; the inputs of the model are rebuilt from the record alone. followers: siblings
    that wait for its prompt. scores_prompt: log p of its prompt is computed, into prompt_parts, one
    for each chunk of it. sample: what it has come to, once it has ended; error: what the step
    raised that ended it.
    """

    uid: int
    seed: int
    stream: int
    group: int
    prompt: list[int]
    params: SamplingParams
    soft: SoftParams | None
    end_ids: frozenset[int]
    thinking_end: int | None
    slots: int = 1
    num_generated: int = 0
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    row: int | None = None
    soft_phase: bool = False
    thinking: bool = False
    thinking_over: bool = False
    rule: EntropyRule | None = None
    embedding_noise: float = 0.0
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    followers: list[Sequence] = field(default_factory=list)
    scores_prompt: bool = False
    prompt_parts: list[PromptLogprobs] = field(default_factory=list)
    sample: Sample | None = None
    error: BaseException | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + self.num_generated

    @property
    def is_fresh(self) -> bool:
        """Never ran: it can take over the prompt that a sibling computed."""
        return self.num_generated == 0 and self.row is None

    @property
    def terminal_ids(self) -> list[int]:
        """Tokens that end its soft phase: those that end it, and the end of thinking."""
        ids = sorted(self.end_ids)
        return ids if self.thinking_end is None else [*ids, self.thinking_end]

    @property
    def min_tokens(self) -> int:
        """It may not end before it has so many."""
        return max(self.params.min_tokens, self.soft.min_soft_tokens if self.soft else 0)

    @property
    def held_back(self) -> list[int]:
        """Tokens that its next position may not be: ends that would come too early."""
        if self.soft and self.num_generated < self.soft.min_soft_tokens:
            return self.terminal_ids
        return sorted(self.end_ids) if self.num_generated < self.min_tokens else []

    @property
    def forced_token(self) -> int | None:
        """The token that the end of thinking puts after ``tokens``, None when it is free."""
        return self.thinking_end if self.thinking and self.thinking_over else None

    @property
    def may_draw_unlisted(self) -> bool:
        """Its next position may be drawn from more tokens than a position records.

        A position that was not read yet may have ended the soft phase; one that has ended the
        sample does not count, for what is drawn after it is dropped.
        """
        params = self.params
        if params.temperature == 0 or 1 <= params.top_k <= self.slots:
            return False
        unread = self.num_generated > len(self.tokens)
        return not self.soft_phase or (unread and self.thinking_end is not None)

    @property
    def asks_entropy(self) -> bool:
        """That of its next position is needed."""
        return self.rule is not None and self.thinking

    @property
    def is_awaited(self) -> bool:
        """A position that has been drawn and not read may change it, or how the next is drawn."""
        if not self.thinking:
            return False
        unread = self.num_generated - len(self.tokens)
        by_rule = self.rule is not None and self.rule.may_act(unread)
        return self.thinking_over or by_rule or self._spends_budget(self.num_generated)

    def _spends_budget(self, tokens: int) -> bool:
        budget = self.soft.max_soft_tokens if self.soft else None
        return budget is not None and tokens >= budget

    def advance(self, token: int, soft: bool, entropy: float | None) -> bool:
        """Takes a position that was read; returns whether the next one is drawn softly.

        soft: as the device goes on by itself. entropy: see `asks_entropy`.
        """
        self.tokens.append(token)
        if not self.thinking:
            return False
        assert self.soft is not None
        over = self._spends_budget(len(self.tokens))
        self.thinking = token != self.thinking_end and token not in self.end_ids
        if self.rule is not None and self.thinking:
            assert entropy is not None
            # In this order: a rule sees every entropy.
            over |= self.rule.read(entropy) and len(self.tokens) >= self.soft.min_soft_tokens
            soft = self.rule.soft
        if over:
            # Without a token that ends thinking the rest simply is discrete.
            self.thinking_over = self.thinking_end is not None
            self.thinking &= self.thinking_over
        self.soft_phase = soft and self.thinking
        return self.soft_phase

    @property
    def is_drawn(self) -> bool:
        """Its last position has been drawn: it ends when that is read."""
        return self.num_generated >= self.params.max_tokens


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` positions."""
    return -(-tokens // PAGE_SIZE)
