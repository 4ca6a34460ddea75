"""The head of a report: the facts of a run, and what happened in plain words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from softgrpo.log.files import number
from softgrpo.log.health import health_warnings
from softgrpo.report.read import Row, Run


@dataclass(frozen=True)
class Change:
    """How a number moved over a run: ``after`` is None when it was measured once only."""

    label: str
    before: float
    after: float | None

    def __str__(self) -> str:
        return (
            f"{self.before:.3f}" if self.after is None else f"{self.before:.3f} → {self.after:.3f}"
        )


def facts(run: Run) -> list[tuple[str, str]]:
    """Label and value of everything the header states."""
    done, planned = (int(run.steps[-1]["step"]) if run.steps else 0), run.setting("run.max_steps")
    soft = run.setting("rollout.soft.enabled")
    found = [
        ("Model", run.setting("model.path")),
        ("Objective", run.setting("algorithm.objective")),
        ("Rollouts", None if soft is None else ("soft thinking" if soft else "discrete")),
        ("Data", run.setting("data.train")),
        ("Learning rate", run.setting("optim.lr")),
        ("Batch", _batch(run)),
        ("Seed", run.setting("run.seed")),
        ("Steps", f"{done} of {planned}" if planned else str(done)),
        ("Time in steps", duration(wall_time(run)) if run.steps else None),
    ]
    return [(label, str(value)) for label, value in found if value is not None]


def held_out(run: Run) -> list[Change]:
    """mean@n and the pass@k of the largest k, first evaluation to last."""
    changes = []
    for kind in ("mean", "pass"):
        name = _largest(run.evals, rf"eval/{kind}@(\d+)")
        values = [v for row in run.evals if name and (v := number(row.get(name))) is not None]
        if name and values:
            after = values[-1] if len(values) > 1 else None
            changes.append(Change(name.removeprefix("eval/"), values[0], after))
    return changes


def training_reward(run: Run) -> Change | None:
    """Mean reward over the first and the last steps (a tenth of the run, at least 5 steps)."""
    rewards = [v for row in run.steps if (v := number(row.get("reward"))) is not None]
    if not rewards:
        return None
    width = max(5, len(rewards) // 10)
    if len(rewards) < 2 * width:
        return Change("training reward", fmean(rewards), None)
    label = f"training reward, first and last {width} steps"
    return Change(label, fmean(rewards[:width]), fmean(rewards[-width:]))


def sentences(run: Run) -> list[str]:
    """What happened, for somebody who reads nothing else."""
    if not run.steps and not run.evals:
        return ["No step has been recorded yet."]
    said = [_moved(change, run) for change in held_out(run)]
    reward = training_reward(run)
    if reward and reward.after is not None:
        said.append(
            f"Training reward went from {reward.before:.3f} to {reward.after:.3f} "
            f"({reward.label.split(', ')[1]})."
        )
    elif reward:
        said.append(f"Mean training reward so far: {reward.before:.3f}.")
    return said + _health(run) + _speed(run)


def _health(run: Run) -> list[str]:
    """What the health watch warned of, the latest last."""
    warnings = health_warnings(run.steps, int(number(run.setting("health.window")) or 0))
    return [f"Warning at step {warning.step}: {warning.text}." for warning in warnings[-3:]]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def wall_time(run: Run) -> float:
    return sum(number(row.get("step_time")) or 0.0 for row in run.steps)


def _moved(change: Change, run: Run) -> str:
    first, last = run.evals[0]["step"], run.evals[-1]["step"]
    if change.after is None:
        return f"Held-out {change.label} was {change.before:.3f} at step {first}."
    step = change.after - change.before
    verb = "rose" if step > 0 else "fell" if step < 0 else "stayed"
    return (
        f"Held-out {change.label} {verb} from {change.before:.3f} at step {first} "
        f"to {change.after:.3f} at step {last}."
        if step
        else f"Held-out {change.label} {verb} at {change.before:.3f} (steps {first} to {last})."
    )


def _speed(run: Run) -> list[str]:
    times = [v for row in run.steps if (v := number(row.get("step_time"))) is not None]
    rates = [v for row in run.steps if (v := number(row.get("tokens_per_second"))) is not None]
    if not times:
        return []
    said = f"A step took {fmean(times):.1f} s on average"
    rollout = sum(number(row.get("time/rollout")) or 0.0 for row in run.steps)
    if rollout and sum(times):
        said += f", {rollout / sum(times):.0%} of it rollout"
    if rates:
        said += f"; rollouts made {fmean(rates):,.0f} tokens a second"
    return [said + "."]


def _batch(run: Run) -> str | None:
    prompts, group = run.setting("rollout.prompts_per_step"), run.setting("rollout.group_size")
    return None if prompts is None or group is None else f"{prompts} prompts of {group} samples"


def _largest(rows: Sequence[Row], pattern: str) -> str | None:
    """The metric of the pattern with the largest number in it."""
    names = {key for row in rows for key in row if re.fullmatch(pattern, key)}
    return max(names, key=lambda name: int(name.rsplit("@", 1)[1]), default=None)
