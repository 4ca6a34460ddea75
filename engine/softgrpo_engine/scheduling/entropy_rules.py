"""Thinking that ends or changes its form by the entropy of the next token. No torch here.

An entropy is that of the distribution that a position was drawn from: in nats, over the whole
vocabulary, at the soft temperature. What follows from it holds from the next position on.
"""

from __future__ import annotations

from typing import Protocol

from softgrpo_engine.params import SoftParams


class EntropyRule(Protocol):
    """State of one sample while it thinks. soft: its next position is soft."""

    soft: bool

    def read(self, entropy: float) -> bool:
        """Takes the entropy of the next position; whether thinking is over."""

    def may_act(self, unread: int) -> bool:
        """Whether ``read`` may end thinking or change ``soft`` within so many positions."""


class ColdStop:
    """Soft Thinking's cold stop (arXiv 2505.15778): thinking is over after so many soft positions
    in a row of less than so much entropy."""

    soft = True

    def __init__(self, entropy: float, steps: int) -> None:
        self._entropy, self._steps = entropy, steps
        self._cold = 0

    def read(self, entropy: float) -> bool:
        self._cold = self._cold + 1 if entropy < self._entropy else 0
        return self._cold >= self._steps

    def may_act(self, unread: int) -> bool:
        return self._cold + unread >= self._steps


class EntropySwitch:
    """SwiReasoning (arXiv 2510.05069): soft until the entropy falls below that of the last switch
    (at first, of the first position), discrete until, after a window, it rises above that.

    A switch that is one too many ends thinking instead. Its blends with the embeddings of <think>
    and </think> are left out.
    """

    def __init__(self, window: int, max_switches: int | None) -> None:
        self.soft = True
        self._window, self._left = window, max_switches
        self._reference: float | None = None
        self._stay = 0  # positions since the last switch

    def read(self, entropy: float) -> bool:
        if self._reference is None:
            self._reference = entropy
        self._stay += 1
        rises = entropy > self._reference and self._stay >= self._window
        if not (entropy < self._reference if self.soft else rises):
            return False
        if self._left == 0:
            return True
        self._left = None if self._left is None else self._left - 1
        self.soft, self._reference, self._stay = not self.soft, entropy, 0
        return False

    def may_act(self, unread: int) -> bool:
        return self.soft or self._stay + unread >= self._window


def entropy_rule(soft: SoftParams | None) -> EntropyRule | None:
    """The rule that the settings ask for, fresh for a sample."""
    if soft is None:
        return None
    if soft.cold_stop_entropy is not None:
        return ColdStop(soft.cold_stop_entropy, soft.cold_stop_steps)
    if soft.switch_window is not None:
        return EntropySwitch(soft.switch_window, soft.max_switches)
    return None
