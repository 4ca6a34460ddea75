"""The plan of a run: memory and time of each phase on 1, 8 and 64 GPUs, and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from softgrpo.config import Config, ConfigError
from softgrpo.learner.device import check_device
from softgrpo.tools.plan.depth import peaks_and_flops
from softgrpo.tools.plan.model import model_config
from softgrpo.tools.plan.seconds import Hardware, Size, kv_cache, seconds
from softgrpo.tools.plan.walk import (
    GPUS_OF_A_NODE,
    OLD,
    PHASES,
    REFERENCE,
    ROLLOUT,
    START,
    SYNC,
    UPDATE,
    Share,
)
from softgrpo_engine.model.config import DecoderConfig

GIB = 2**30
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Column:
    """What a run does on so many GPUs. peaks: bytes on each by phase, seconds: of a step by phase.
    changes: settings that would make it fit; empty where it does."""

    gpus: int
    peaks: dict[str, int]
    seconds: dict[str, float]
    changes: list[str]

    @property
    def fits(self) -> bool:
        return not self.changes


@dataclass(frozen=True)
class Plan:
    """Of a configuration. parameters: of its model."""

    config: Config
    hardware: Hardware
    parameters: int
    columns: list[Column]

    @property
    def fits(self) -> bool:
        """Whether there is a number of GPUs on which it runs."""
        return any(column.fits for column in self.columns)

    def rows(self) -> list[dict[str, Any]]:
        """One for each number of GPUs and phase; seconds None at the start, which no step has."""
        return [
            {
                "recipe": self.config.run.name,
                "gpus": column.gpus,
                "phase": phase,
                "peak_gib": round(peak / GIB, 2),
                "seconds": _rounded(column.seconds.get(phase)),
            }
            for column in self.columns
            for phase, peak in sorted(column.peaks.items(), key=lambda x: PHASES.index(x[0]))
        ]

    def table(self) -> Table:
        """For a terminal."""
        hardware, config = self.hardware, self.config
        table = Table(
            title=f"{config.run.name}: {config.model.path}, {self.parameters / 1e9:.2f} B "
            "parameters; peak GiB on each GPU, and seconds of a step",
            caption=f"{hardware.name}, {hardware.usable / GIB:.1f} GiB of it for tensors; "
            f"{hardware.training / 1e12:.0f} TFLOP/s in training, {hardware.attention / 1e12:.0f} "
            f"in its attention, {hardware.bandwidth / 1e12:.1f} TB/s of memory and "
            f"{hardware.links / 1e9:.0f} GB/s of links reached; every response of full length. "
            f"FSDP within a node of {GPUS_OF_A_NODE}, replicas over nodes.",
        )
        table.add_column("phase")
        for column in self.columns:
            table.add_column(f"{column.gpus} GPU{'s' * (column.gpus > 1)}", justify="right")
        for phase in PHASES:
            if any(phase in column.peaks for column in self.columns):
                table.add_row(phase, *(self._cell(column, phase) for column in self.columns))
        table.add_section()
        table.add_row("[bold]peak, s a step[/bold]", *map(self._total, self.columns))
        days = [sum(c.seconds.values()) * config.run.max_steps / 86400 for c in self.columns]
        table.add_row(f"days for {config.run.max_steps} steps", *(f"{day:.1f}" for day in days))
        return table

    def _cell(self, column: Column, phase: str) -> str:
        peak, time = column.peaks.get(phase), column.seconds.get(phase)
        if peak is None:
            return ""
        text = f"{peak / GIB:.1f}" if time is None else f"{peak / GIB:.1f} / {time:.1f} s"
        return text if peak <= self.hardware.usable else f"[red]{text}[/red]"

    def _total(self, column: Column) -> str:
        text = f"{max(column.peaks.values()) / GIB:.1f} / {sum(column.seconds.values()):.0f} s"
        return f"[bold]{text}[/bold]" if column.fits else f"[red]{text}: does not fit[/red]"

    def advice(self) -> list[str]:
        """A line for each number of GPUs on which it does not run."""
        return [
            f"{column.gpus} GPU{'s' * (column.gpus > 1)}: {max(column.peaks.values()) / GIB:.1f} "
            f"GiB, {self.hardware.usable / GIB:.1f} there are; {'; '.join(column.changes)}"
            for column in self.columns
            if not column.fits
        ]


def make_plan(config: Config, hardware: Hardware | None = None) -> Plan:
    """The run on 1, 8 and 64 GPUs (eight to a node), as far as there is a prompt for each.

    Raises ConfigError for what only a GPU could tell: another engine, 8-bit optimizers.
    """
    check_device(config, "cuda")
    hardware = hardware or Hardware()
    if config.optim.name != "adamw":
        raise ConfigError(f"--plan knows optim.name=adamw, not {config.optim.name!r}")
    if config.rollout.engine != "native":
        raise ConfigError(f"--plan knows rollout.engine=native, not {config.rollout.engine!r}")
    model = model_config(config.model.path)
    size = Size.of(DecoderConfig.from_hf(model, ()))
    columns = []
    for gpus in (n for n in GPUS if n <= config.rollout.prompts_per_step):
        peaks, flops = peaks_and_flops(config, model, gpus)
        times = seconds(config, size, gpus, hardware, flops)
        remedies = changes(config, size, gpus, peaks, hardware.usable)
        columns.append(Column(gpus, peaks, times, remedies))
    return Plan(config, hardware, size.parameters, columns)


def changes(
    config: Config, size: Size, gpus: int, peaks: dict[str, int], usable: float
) -> list[str]:
    """What to set, the cheapest first, where a phase needs more than there is."""
    over = {phase: peak - usable for phase, peak in peaks.items() if peak > usable}
    found = []
    with_cache = [over[phase] for phase in (START, ROLLOUT, SYNC) if phase in over]
    if with_cache:
        share, cache = Share.of(config, gpus), kv_cache(config, size, gpus)
        left = math.floor((cache - max(with_cache)) / GIB)
        if left * GIB >= share.group_size * (share.prompt + share.response) * size.kv_bytes:
            found.append(f"set rollout.kv_memory={left}")
        else:
            found.append(f"no room for the KV cache beside the weights: {_more(config, gpus)}")
    of_passes = [over[phase] for phase in (OLD, REFERENCE, UPDATE) if phase in over]
    if of_passes:
        found += _changes_of_passes(config, size, gpus, max(of_passes))
    return found


def _changes_of_passes(config: Config, size: Size, gpus: int, over: float) -> list[str]:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    changes = []
    if config.rollout.sleep == "never":
        changes.append("set rollout.sleep=auto")
    elif config.rollout.sleep == "auto" and 2 * size.parameters > over:
        changes.append("set rollout.sleep=always")
    if not config.optim.gradient_checkpointing:
        changes.append("set optim.gradient_checkpointing=true")
    if config.optim.tokens_per_microbatch > longest:
        changes.append(f"set optim.tokens_per_microbatch={longest}")
    return changes or [_more(config, gpus)]


def _more(config: Config, gpus: int) -> str:
    """Where no setting is left; weights are in no more shards than a node has GPUs."""
    more = "take larger GPUs" if gpus >= GPUS_OF_A_NODE else "take more GPUs"
    return more if config.lora.rank else f"{more}, or train adapters (lora.rank=64)"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
