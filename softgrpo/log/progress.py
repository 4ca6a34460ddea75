"""What a training run shows: a live panel, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from softgrpo.log.files import number

_WINDOW = 10  # steps of the moving average and of the time estimate
_SPARK = 48  # steps of the sparkline
_PHASES = ("rollout", "reward", "train", "sync")
# A position below this top weight counts as a mixture that is worth showing.
_MIXED = 0.9


@dataclass
class _State:
    """What is known of the run. A thread draws it, so values are replaced, never mutated."""

    name: str = ""
    total: int = 0
    step: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[float, ...] = ()
    step_times: tuple[float, ...] = ()
    phase: tuple[str, int | None, int | None] = ("", None, None)
    evals: tuple[Mapping[str, Any], ...] = ()
    started: float = 0.0

    @property
    def reward_average(self) -> float | None:
        return fmean(self.rewards[-_WINDOW:]) if self.rewards else None

    @property
    def remaining(self) -> float | None:
        """Seconds to the last step at the pace of the latest ones, evaluations not counted."""
        if not self.step_times:
            return None
        return fmean(self.step_times[-_WINDOW:]) * max(0, self.total - self.step)


class TrainProgress:
    """Shows a training run: ``with TrainProgress() as progress: progress.start(...)``.

    On a terminal a panel that redraws itself four times a second in a thread of its own, with
    samples and messages scrolling above it. Anywhere else (a pipe, a log file, a terminal that
    cannot draw) one plain line a step without control characters. The calls only note what they
    are told, so they cost the training nothing. A quiet console shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or stdout_console()
        self._is_live = can_redraw(self._console)
        self._live: Live | None = None
        self._state = _State()

    def __enter__(self) -> TrainProgress:
        if self._is_live:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4
            )
            self._live.start()
            # rich hides the cursor; a run that is killed could not bring it back.
            self._console.show_cursor(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, total_steps: int, start_step: int, name: str) -> None:
        """Begins the run ``name`` of ``total_steps`` steps, ``start_step`` of them already done."""
        self._state = _State(name, total_steps, start_step, started=time.monotonic())
        if not self._is_live:
            left = f"steps {start_step + 1} to {total_steps}"
            self._line(f"run {name}: {left if start_step < total_steps else 'all steps are done'}")

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """What the trainer does now: rollout, reward, train, sync or eval; how far it is in it."""
        self._state.phase = (name, done, total)

    def step(self, row: Mapping[str, Any]) -> None:
        """A training step is done; ``row`` is its line of metrics.jsonl."""
        state = self._state
        state.step, state.row = int(row["step"]), dict(row)
        reward, seconds = number(row.get("reward")), number(row.get("step_time"))
        if reward is not None:
            state.rewards = (*state.rewards[1 - _SPARK :], reward)
        if seconds is not None:
            state.step_times = (*state.step_times[1 - _WINDOW :], seconds)
        if not self._is_live:
            self._line(_plain_step(state))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A held-out evaluation is done; ``row`` is its line of metrics.jsonl."""
        self._state.evals = (*self._state.evals[:1], dict(row))  # the first and the latest
        values = ", ".join(f"{name} {value}" for name, value in _evaluation_values(row))
        self.message(f"held-out after step {row['step']}: {values}")

    def message(self, text: str) -> None:
        if self._is_live:
            self._console.print(Text(_visible(text), style="bold"))
        else:
            self._line(_visible(text))

    def sample(self, row: Mapping[str, Any]) -> None:
        """Prints a row of samples.jsonl: prompt, completion, reward and the most mixed positions.

        Soft positions are underlined, mixtures bold; in plain lines mixtures stand between « ».
        """
        if self._is_live:
            self._console.print(_sample_text(row))
        else:
            self._line(_sample_text(row, marks=True).plain)

    def _line(self, text: str) -> None:
        write_line(self._console, text)

    def _render(self) -> RenderableType:
        return _panel(self._state)


def stdout_console() -> Console:
    """On stdout; a terminal only where that is one."""
    # Not rich's own test: FORCE_COLOR must not put control characters into a log file.
    return Console(force_terminal=None if sys.stdout.isatty() else False)


def can_redraw(console: Console) -> bool:
    """Whether a bar or a panel can redraw itself there: else plain lines are shown."""
    utf8 = console.encoding.lower().startswith("utf")
    return console.is_terminal and not console.is_dumb_terminal and utf8


def write_line(console: Console, text: str) -> None:
    """A plain line, without control characters, of what the file can encode."""
    if console.quiet:
        return
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    console.file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    console.file.flush()


def _panel(state: _State) -> RenderableType:
    row = state.row
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row("reward", _reward_text(state))
    table.add_row(
        "length",
        _join(
            _number(row, "completions/mean_length", "{:.1f} tokens"),
            _number(row, "completions/clipped_ratio", "cut {:.0%}"),
            _number(row, "soft/length", "soft {:.1f}"),
            _number(row, "soft/effective_candidates", "candidates {:.2f}"),
        ),
    )
    table.add_row(
        "update",
        _join(
            _number(row, "grad_norm", "grad norm {:.3g}"),
            _number(row, "loss", "loss {:.3g}"),
            _number(row, "learning_rate", "lr {:.3g}"),
        ),
    )
    table.add_row(
        "speed",
        _join(
            _number(row, "tokens_per_second", "{:,.0f} tokens/s"),
            _number(row, "step_time", "{:.1f} s a step"),
        ),
    )
    table.add_row("time", _split_text(row))
    if state.evals:
        table.add_row("held-out", _held_out_text(state.evals))
    # In a grid: on its own a bar does not end its line.
    bar = Table.grid(expand=True)
    total = max(1, state.total)
    bar.add_row(ProgressBar(total, state.step, complete_style="cyan", finished_style="green"))
    return Panel(
        Group(_head_text(state), bar, table),
        title=Text(f"softgrpo · {_visible(state.name)}"),
        title_align="left",
        border_style="dim",
    )


def _head_text(state: _State) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"step {state.step}/{state.total}", style="bold")
    name, done, total = state.phase
    if name:
        text.append(f"   {name}", style="cyan")
        if done is not None:
            text.append(f" {done}" + ("" if total is None else f"/{total}"), style="cyan")
    text.append(f"   elapsed {_clock(time.monotonic() - state.started)}", style="dim")
    if state.remaining is not None:
        text.append(f"   ETA {_clock(state.remaining)}", style="dim")
    return text


def _reward_text(state: _State) -> Text:
    text = Text(_number(state.row, "reward", "{:.3f}") or "-", style="bold")
    if state.reward_average is not None:
        text.append(f"  average {state.reward_average:.3f}  ", style="not bold")
        text.append(_sparkline(state.rewards), style="not bold green")
    return text


def _split_text(row: Mapping[str, Any]) -> Text:
    """The phases of a step as shares of it."""
    shares = _time_shares(row)
    text = Text()
    for (name, share), style in zip(shares, ("blue", "magenta", "yellow", "green"), strict=False):
        text.append("■ ", style=style)
        text.append(f"{name} {share:.0%}  ")
    return text if shares else Text("-")


def _held_out_text(evals: Sequence[Mapping[str, Any]]) -> str:
    first, latest = dict(_evaluation_values(evals[0])), dict(_evaluation_values(evals[-1]))
    if len(evals) == 1:
        return _join(*(f"{name} {value}" for name, value in latest.items()))
    return _join(*(f"{name} {first.get(name, '-')} → {v}" for name, v in latest.items()))


def _plain_step(state: _State) -> str:
    row = state.row
    shares = " ".join(f"{name} {share:.0%}" for name, share in _time_shares(row))
    parts = [
        f"step {state.step}/{state.total}",
        _number(row, "reward", "reward {:.3f}"),
        "" if state.reward_average is None else f"average {state.reward_average:.3f}",
        _number(row, "completions/mean_length", "length {:.1f}"),
        _number(row, "tokens_per_second", "{:.0f} tokens/s"),
        _number(row, "step_time", "step {:.1f} s") + (f" ({shares})" if shares else ""),
        _number(row, "grad_norm", "grad norm {:.3g}"),
        "" if state.remaining is None else f"ETA {_clock(state.remaining)}",
    ]
    return "  ".join(part for part in parts if part)


def _sample_text(row: Mapping[str, Any], marks: bool = False) -> Text:
    positions = row.get("positions") or []
    soft = sum(position["kind"] == 1 for position in positions)
    text = Text(f"sample  step {row['step']}", style="bold")
    for label in ("reward", "advantage"):
        value = number(row.get(label))
        text.append(f"  {label} -" if value is None else f"  {label} {value:.3g}")
    text.append(f"  {row.get('finish_reason')}  {soft} of {len(positions)} positions soft\n")
    prompt = _visible(row["prompt"])
    text.append("  prompt  ", style="not bold dim")
    text.append(f"{'...' if len(prompt) > 72 else ''}{prompt[-72:]}\n", style="not bold")
    text.append(f"  answer  {_visible(row['answer'])}\n", style="not bold dim")
    text.append("  output  ", style="not bold dim")
    for position in positions:
        _append_token(text, position, marks)
    text.append("" if positions else _visible(row["text"]), style="not bold")
    mixed = sorted(
        (p for p in enumerate(positions) if _top_weight(p[1]) < _MIXED),
        key=lambda pair: _top_weight(pair[1]),
    )
    if mixed:
        text.append("\n  mixed   ", style="not bold dim")
        text.append(
            "; ".join(_candidates(i, position) for i, position in mixed[:3]), style="not bold"
        )
    return text


def _append_token(text: Text, position: Mapping[str, Any], marks: bool) -> None:
    token = _visible(position["token"])
    mixed = position["kind"] == 1 and _top_weight(position) < _MIXED
    if marks:
        text.append(f"«{token}»" if mixed else token)
    elif position["kind"] == 1:
        text.append(token, style="underline bold cyan" if mixed else "underline not bold")
    else:
        text.append(token, style="not bold")


def _candidates(index: int, position: Mapping[str, Any]) -> str:
    pairs = ", ".join(
        f"'{_visible(token)}' {weight:.0%}" for token, weight in position["candidates"][:4]
    )
    return f"{index + 1}: {pairs}"


def _top_weight(position: Mapping[str, Any]) -> float:
    return max((weight for _, weight in position["candidates"]), default=1.0)


def _evaluation_values(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scores of an evaluation: mean@n and pass@k."""
    return [
        (key.removeprefix("eval/"), f"{value:.3f}")
        for key in row
        if "@" in key and (value := number(row[key])) is not None
    ]


def _time_shares(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    seconds = [(name, number(row.get(f"time/{name}"))) for name in _PHASES]
    total = number(row.get("step_time")) or 0.0
    return [(name, value / total) for name, value in seconds if total and value is not None]


def _number(row: Mapping[str, Any], key: str, form: str) -> str:
    value = number(row.get(key))
    return "" if value is None else form.format(value)


def _join(*parts: str) -> str:
    return "   ".join(part for part in parts if part) or "-"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _sparkline(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in values)


def _visible(text: Any) -> str:
    """Text that prints on one line and cannot steer a terminal: newlines and controls as marks."""
    text = str(text).replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
