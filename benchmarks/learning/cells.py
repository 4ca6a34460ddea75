"""What is run: every cell is one training and one evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAMPLES = 32  # of a question, in the evaluation


@dataclass(frozen=True)
class Cell:
    """task: easy or hard. overrides: what differs from the task's recipe."""

    task: str
    name: str
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.task}/{self.name}-{self.seed}"

    @property
    def mode(self) -> str:
        """A model is evaluated with the kind of tokens that it was trained with."""
        return "discrete" if "rollout.soft.enabled=false" in self.overrides else "soft"


def is_done(folder: Path) -> bool:
    """Whether the cell of this folder has come to its end."""
    return (folder / "evaluation" / "results.json").exists()


# What is kept of the log: name here, name there.
SERIES = {
    "reward": "reward",
    "mismatch": "sampling/sampling_logp_difference/mean",
    "grad_norm": "grad_norm",
    "candidates_in_training": "soft/effective_candidates",
}


def read_training(folder: Path) -> dict[str, Any]:
    """What the log of a run says, step by step; None where a step had nothing to say."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "reward" in row]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["num_tokens"],
        **{name: [row.get(key) for row in steps] for name, key in SERIES.items()},
    }


DISCRETE = ("rollout.soft.enabled=false",)
OFFICIAL = ("algorithm.objective=official",)
EXACT = ("algorithm.objective=exact",)
CONCRETE = ("algorithm.objective=concrete",)
MAIN = {"discrete": DISCRETE, "official": OFFICIAL, "exact": EXACT, "concrete": CONCRETE}

ABLATIONS = {
    **{f"exact-tau-{tau}": (*EXACT, f"rollout.soft.tau={tau}") for tau in (0.5, 1.0)},
    **{f"concrete-tau-{tau}": (*CONCRETE, f"rollout.soft.tau={tau}") for tau in (0.5, 1.0)},
    **{f"official-tau-{tau}": (*OFFICIAL, f"rollout.soft.tau={tau}") for tau in (0.5, 1.0)},
    "dirichlet": (*EXACT, "rollout.soft.noise=dirichlet", "rollout.soft.tau=1.0"),
    "gaussian": (
        *EXACT,
        "rollout.soft.noise=gaussian",
        "rollout.soft.noise_scale=0.05",
        "rollout.soft.tau=1.0",
    ),
    "discrete-top-p-1": (*DISCRETE, "rollout.top_p=1.0"),
    "concrete-top-p-1": (*CONCRETE, "rollout.soft.top_p=1.0"),
    # Explores more; tested at T 1 as all others are.
    **{
        f"{name}-T-1.5": (*MAIN[name], f"rollout{soft}.temperature=1.5")
        for name, soft in (("discrete", ""), ("exact", ".soft"), ("concrete", ".soft"))
    },
    # Three and ten times the learning rate: who learns more, what breaks, and what rises first?
    **{
        f"{name}-lr-{lr}": (*changes, f"optim.lr={lr}")
        for lr in ("3e-5", "1e-4")
        for name, changes in MAIN.items()
    },
}

CELLS = [
    *(Cell("easy", name, seed, changes) for seed in range(3) for name, changes in MAIN.items()),
    *(Cell("easy", name, 0, changes) for name, changes in ABLATIONS.items()),
    *(Cell("hard", name, seed, changes) for seed in range(3) for name, changes in MAIN.items()),
]
