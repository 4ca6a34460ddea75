"""The plans of the recipes, and a whole 7B model of 28 layers on 64 ranks beside its plan.

    python benchmarks/plan.py --json benchmarks/results/plan.json paper-1.5b paper-3b paper-7b
    python benchmarks/plan.py --json benchmarks/results/plan.json --whole

Rows are those of `softgrpo-train --plan --json`: memory from a fake run, seconds by arithmetic. A
plan walks 4 and 5 layers and goes on from there; --whole walks paper-7b at its full depth. Recipes
that are not named keep their rows in the file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _machine import versions

from softgrpo.config import Config
from softgrpo.tools.plan import make_plan
from softgrpo.tools.plan.depth import peaks_and_flops
from softgrpo.tools.plan.device import FakeGPU
from softgrpo.tools.plan.model import model_config
from softgrpo.tools.plan.seconds import Hardware
from softgrpo.tools.plan.walk import walk

WHOLE, RANKS = "paper-7b, all layers", 64


def whole() -> list[dict[str, Any]]:
    """Peaks of the whole model by phase, and those that are planned from two shallow ones."""
    config = Config.load("paper-7b")
    model, gpu = model_config(config.model.path), FakeGPU()
    walk(gpu, config, model, model.num_hidden_layers, RANKS)
    planned, _ = peaks_and_flops(config, model, RANKS)
    return [
        {
            "recipe": WHOLE,
            "gpus": RANKS,
            "phase": phase,
            "peak_gib": round(max(p for (at, _), p in gpu.peaks.items() if at == phase) / 2**30, 3),
            "planned_gib": round(peak / 2**30, 3),
        }
        for phase, peak in planned.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--whole", action="store_true", help="paper-7b at its full depth")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    for name in [*arguments.recipes, *([WHOLE] if arguments.whole else [])]:
        new = whole() if name == WHOLE else make_plan(Config.load(name)).rows()
        rows = [row for row in rows if row["recipe"] != name] + new
        print(*new, sep="\n")
        settings = {"planned_for": asdict(Hardware())}
        result = {"hardware": "none: fake tensors", "versions": versions(), "settings": settings}
        arguments.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
