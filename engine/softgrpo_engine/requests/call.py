"""The samples that a caller waits for, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from softgrpo_engine.outputs import Output, Sample
from softgrpo_engine.requests.samples import prompt_logprobs
from softgrpo_engine.scheduling.sequence import Sequence


class Call:
    """The samples of one call, while they are computed.

    samples: gives sequences as Samples. It is read by ``ended`` (whole groups) or by ``news``
    (every token); both raise what a step raised that their samples were in.
    """

    def __init__(self, samples: Callable[[Seq[Sequence]], list[Sample]]) -> None:
        self._samples = samples
        self._prompts: list[list[int]] = []
        self._open: dict[int, list[Sequence]] = {}  # groups, by the index of their prompt
        self._prompt_of: dict[Sequence, int] = {}
        self._unread: dict[Sequence, int] = {}  # tokens that the caller has seen

    def add(self, prompts: Seq[list[int]], groups: Seq[list[Sequence]]) -> list[Sequence]:
        """Takes further prompts (token ids) with their samples; returns these."""
        indexed = list(enumerate(groups, len(self._prompts)))
        self._prompts += prompts
        self._open.update(indexed)
        new = {sequence: index for index, group in indexed for sequence in group}
        self._prompt_of.update(new)
        self._unread.update(dict.fromkeys(new, 0))
        return list(new)

    @property
    def sequences(self) -> list[Sequence]:
        """Those of groups that ``ended`` has not given yet; a group given is not kept."""
        return list(self._prompt_of)

    @property
    def num_unfinished(self) -> int:
        return sum(s.sample is None for s in self._prompt_of)

    @property
    def is_done(self) -> bool:
        """``ended`` has given every group."""
        return not self._open

    @property
    def is_read(self) -> bool:
        """``news`` has given the end of every sample."""
        return not self._unread

    @property
    def has_news(self) -> bool:
        return any(s.sample or len(s.tokens) > seen for s, seen in self._unread.items())

    def ended(self) -> Iterator[tuple[int, Output]]:
        """(prompt index, Output) of every group that has ended, each once."""
        for index, group in list(self._open.items()):
            if all(sequence.sample for sequence in group):
                for sequence in self._open.pop(index):
                    _raise_error(sequence)
                    del self._prompt_of[sequence], self._unread[sequence]
                samples = [sequence.sample for sequence in group if sequence.sample]
                scored = prompt_logprobs(group[0]) if group else None
                yield index, Output(list(self._prompts[index]), samples, scored)

    def news(self) -> Iterator[tuple[int, Sample]]:
        """(prompt index, the sample so far) of those that went on since they were last given."""
        (news,) = news_of([self])
        yield from news

    def _gone_on(self) -> _GoneOn:
        """Those that went on since they were last given; they count as given."""
        found = _GoneOn([], [], None)
        for sequence, seen in list(self._unread.items()):
            if sequence.error is not None:
                found.error = sequence.error
            elif sequence.sample is not None:
                found.ended.append(sequence)
                del self._unread[sequence]
            elif len(sequence.tokens) > seen:
                self._unread[sequence] = len(sequence.tokens)
                found.unfinished.append(sequence)
        return found


@dataclass
class _GoneOn:
    ended: list[Sequence]
    unfinished: list[Sequence]
    error: BaseException | None


def news_of(calls: Seq[Call]) -> list[Iterator[tuple[int, Sample]]]:
    """`Call.news` of several calls of one engine, with one read of its record for all."""
    gone_on = [call._gone_on() for call in calls]
    # Before the first is given: whoever takes it may step, which can end the others and give
    # their rows of the record away.
    unfinished = [sequence for found in gone_on for sequence in found.unfinished]
    samples = dict(zip(unfinished, calls[0]._samples(unfinished), strict=True))
    return [_news(call, found, samples) for call, found in zip(calls, gone_on, strict=True)]


def _news(
    call: Call, found: _GoneOn, samples: dict[Sequence, Sample]
) -> Iterator[tuple[int, Sample]]:
    for sequence in (*found.ended, *found.unfinished):
        sample = samples.get(sequence, sequence.sample)
        assert sample is not None
        yield call._prompt_of[sequence], sample
    if found.error is not None:
        raise found.error


def _raise_error(sequence: Sequence) -> None:
    if sequence.error is not None:
        raise sequence.error
