"""Says in words when a run goes wrong, before the reward shows it.

The published runs that collapsed all went the same way: the difference between the engine's and the
trainer's probabilities and the KL to the first model rose for hundreds of steps, then the reward
fell. A trend is judged by ranks (Mann 1945, Kendall 1975), which noise and outliers do not fool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MISMATCH = "sampling/sampling_logp_difference/mean"
KL = "kl"
_NAMES = {MISMATCH: "the engine/trainer mismatch", KL: "the KL to the first model"}

_TREND = 3.0  # standard deviations of the rank statistic
_RISE = 1.1  # within a window
_LEVEL = 1.5  # of the mismatch, against the first window
_FALL = 0.9  # of the reward, against the best window
_FALL_ERRORS = 5.0  # and in standard errors: the best of many windows was lucky


@dataclass(frozen=True)
class HealthWarning:
    """What was noticed at a step, as one sentence."""

    step: int
    text: str


class HealthWatch:
    """Judges the metrics rows of a run, one after the other; a pure function of the rows.

    It warns from step 3 * window on, of each thing at most once a window:

    - the mismatch rises over the last window, and is 1.5 times that of the first;
    - the KL rises by a tenth over the last window, and the reward has not risen over three;
    - the reward has fallen by a tenth below its best window, with the mismatch as above or the KL a
      tenth higher than then: `collapsed`.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.collapsed = False
        self._steps: list[int] = []
        self._series: dict[str, list[float]] = {"reward": [], MISMATCH: [], KL: []}
        self._warned: dict[str, int] = {}

    def observe(self, row: Mapping[str, Any]) -> list[HealthWarning]:
        """Takes the row of the next step and returns what is new to say."""
        self._steps.append(int(row["step"]))
        for name, values in self._series.items():
            value = row.get(name)
            values.append(math.nan if value is None else float(value))
        if not self.window or len(self._steps) < 3 * self.window:
            return []
        found = {
            MISMATCH: self._rising_mismatch(),
            KL: self._rising_kl(),
            "reward": self._fallen_reward(),
        }
        self.collapsed |= found["reward"] is not None
        return [
            HealthWarning(self._steps[-1], text)
            for name, text in found.items()
            if text is not None and self._is_news(name)
        ]

    def best(self, steps: Iterable[int]) -> int:
        """The step whose window of rewards, ending there, is best; the latest of equals.

        A step before the end of the first window is the best only where there is no other.
        """
        return max(steps, key=lambda step: (self._score(step), step))

    def _score(self, step: int) -> float:
        end = self._steps.index(step) + 1
        mean = self._mean("reward", end - self.window, end) if end >= self.window else math.nan
        return -math.inf if math.isnan(mean) else mean

    def _rising_mismatch(self) -> str | None:
        first, now = self._mean(MISMATCH, 0, self.window), self._mean(MISMATCH, -self.window)
        if not (trend(self._last(MISMATCH)) > _TREND and now >= _LEVEL * first):
            return None
        return (
            f"{_NAMES[MISMATCH]} rises: {now:.2g} over the last {self.window} steps, "
            f"{now / first:.1f} times that of the first"
        )

    def _rising_kl(self) -> str | None:
        values = self._last(KL)
        third = len(values) // 3
        before, after = _mean(values[:third]), _mean(values[-third:])
        width = self.window
        learns = self._mean("reward", -width) > self._mean("reward", -3 * width, -2 * width)
        if learns or not (trend(values) > _TREND and after >= _RISE * before):
            return None
        return (
            f"{_NAMES[KL]} rises ({before:.2g} to {after:.2g} over the last {width} steps) and the "
            "reward does not"
        )

    def _fallen_reward(self) -> str | None:
        """The reward against its best window, and what drifted meanwhile."""
        width, rewards = self.window, np.array(self._series["reward"])
        means = np.convolve(np.nan_to_num(rewards), np.ones(width) / width, mode="valid")
        best = int(means.argmax())
        top, now = rewards[best : best + width], rewards[-width:]
        noise = math.sqrt((np.nanvar(top) + np.nanvar(now)) / width)
        fall = _mean(top) - _mean(now)
        if not (fall > _FALL_ERRORS * noise and fall > (1.0 - _FALL) * abs(_mean(top))):
            return None
        drifted = []
        first, mismatch = self._mean(MISMATCH, 0, width), self._mean(MISMATCH, -width)
        if mismatch >= _LEVEL * first:
            drifted.append(f"{_NAMES[MISMATCH]} came to {mismatch / first:.1f} times its first")
        then, kl = self._mean(KL, best, best + width), self._mean(KL, -width)
        if kl >= _RISE * then:
            drifted.append(f"{_NAMES[KL]} went from {then:.2g} to {kl:.2g}")
        if not drifted:
            return None
        steps = f"steps {self._steps[best]} to {self._steps[best + width - 1]}"
        return (
            f"the reward fell from {_mean(top):.3f} ({steps}) to {_mean(now):.3f}, and "
            + " and ".join(drifted)
        )

    def _is_news(self, name: str) -> bool:
        step = self._steps[-1]
        if step - self._warned.get(name, -self.window) < self.window:
            return False
        self._warned[name] = step
        return True

    def _last(self, name: str) -> np.ndarray:
        return np.array(self._series[name][-self.window :])

    def _mean(self, name: str, start: int, end: int | None = None) -> float:
        return _mean(np.array(self._series[name][start:end]))


def trend(values: np.ndarray) -> float:
    """How surely a series rises (> 0) or falls, in standard deviations: Mann-Kendall's z.

    Values that are NaN are left out; 0 with fewer than three others.
    """
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 3:
        return 0.0
    pairs = np.triu_indices(n, 1)
    s = float(np.sign(values[pairs[1]] - values[pairs[0]]).sum())
    return (s - np.sign(s)) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def health_warnings(rows: Iterable[Mapping[str, Any]], window: int) -> list[HealthWarning]:
    """All warnings of a run, from the training rows of its metrics.jsonl."""
    watch = HealthWatch(window)
    return [warning for row in rows for warning in watch.observe(row)]


def _mean(values: np.ndarray) -> float:
    """Mean of what is known, NaN if nothing is: comparisons with it are false."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan
