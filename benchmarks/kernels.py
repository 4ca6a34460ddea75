"""Time of every kernel against what the machine allows and against chains of torch ops.

    python benchmarks/kernels.py --json results.json

The floor of an op is the time to move its bytes at the copy bandwidth, or to do its operations at
the bf16 GEMM rate, both measured here. Runs of one case are interleaved, so that a slow moment of
the machine hits all of them; a figure is the median of the repeats. On a GPU the turns of a
measurement are replayed as a graph, as a decode step is: without the host's launches. What waits
for the GPU cannot be captured; its row says so, and has the launches in its time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _kernel_cases import Case, Run, cases
from _machine import hardware, seconds_of, spread, versions
from rich.console import Console
from rich.table import Table

# One measurement lasts at least this long, by repetition.
SHORTEST = 0.01


def main() -> None:
    """Measures, prints and writes."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        console.print(f"[yellow]the machine is busy (load {os.getloadavg()[0]:.1f})[/]")
    chosen = [c for c in cases(device, arguments.quick) if arguments.op in ("", c.op)]
    if not chosen:
        raise SystemExit(f"--op {arguments.op}: there is no such op")
    machine = hardware(device)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        rows += measure(case, machine, device, arguments.repeats)
        console.print(_table(case, rows[-len(case.runs) :]))
    if arguments.json:
        settings = {"threads": arguments.threads, "repeats": arguments.repeats}
        document = {
            "hardware": machine, "versions": versions(), "settings": settings, "rows": rows,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def measure(
    case: Case, machine: dict[str, Any], device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """One row for each way to do it; the first is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in case.runs}
    turns = {name: _turns(run, device) for name, run in case.runs.items()}
    repeated = {name: _repeated(run, turns[name], device) for name, run in case.runs.items()}
    for _ in range(repeats):
        for name, (all_turns, _) in repeated.items():
            seconds[name].append(seconds_of(all_turns, device) / turns[name])
    floor = max(
        case.bytes / machine["memory_gb_per_s"] / 1e9,
        case.flops / machine["bf16_gemm_gflops"] / 1e9,
    )
    ours = median(seconds["softgrpo"])
    return [
        {
            "op": case.op,
            **case.shape,
            "implementation": name,
            "microseconds": round(median(times) * 1e6, 1),
            "spread": round(spread(times), 3),
            "graph": repeated[name][1],
            "ratio_to_softgrpo": round(median(times) / ours, 2),
            "bytes": case.bytes,
            "floor_microseconds": round(floor * 1e6, 2),
            "percent_of_floor": round(100 * floor / median(times), 1),
            "peak_bytes": _peak_bytes(case.runs[name], device),
        }
        for name, times in seconds.items()
    ]


def _turns(run: Run, device: torch.device) -> int:
    """How often to repeat it for one measurement; warms up on the way."""
    run(0)
    return max(1, round(SHORTEST / max(1e-7, seconds_of(lambda: run(1), device))))


def _repeated(run: Run, turns: int, device: torch.device) -> tuple[Callable[[], None], bool]:
    """All turns as one call, and whether that replays a graph."""

    def all_turns() -> None:
        for i in range(turns):
            run(i)

    if device.type != "cuda":
        return all_turns, False
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_turns()
    except RuntimeError:  # it waits
        torch.cuda.synchronize()
        return all_turns, False
    graph.replay()
    return graph.replay, True


def _peak_bytes(run: Run, device: torch.device) -> int | None:
    """Memory that one call needs beyond what is there; None where nothing tells."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(0)
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    except OSError:
        return None
    before = _status("VmRSS")
    run(0)
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _table(case: Case, rows: list[dict[str, Any]]) -> Table:
    shape = ", ".join(f"{key} {value}" for key, value in case.shape.items())
    table = Table(title=f"{case.op}  {shape}", title_justify="left", title_style="bold")
    table.add_column("implementation", min_width=26)
    for name in ("time", "x softgrpo", "of floor", "memory"):
        table.add_column(name, justify="right", min_width=9)
    for row in rows:
        memory = row["peak_bytes"]
        table.add_row(
            row["implementation"],
            _time(row["microseconds"]),
            f"{row['ratio_to_softgrpo']:.2f}",
            f"{row['percent_of_floor']:.0f} %",
            "" if memory is None else f"{memory / 2**20:.1f} MiB",
        )
    return table


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f} us" if microseconds < 1e4 else f"{microseconds / 1e3:.0f} ms"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time of every kernel against its floor and against chains of torch ops.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--op", default="", help="only this op")
    add("--repeats", type=int, default=7, help="measurements of a case; the median counts")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--quick", action="store_true", help="small shapes: does it run at all")
    add("--json", type=Path, metavar="FILE", help="write the rows here")
    return parser


if __name__ == "__main__":
    main()
