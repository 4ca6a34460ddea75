"""The arms: from which supervised start, with which thoughts, scored how."""

from __future__ import annotations

from dataclasses import dataclass

from graphs import FILL, HOPS, LISTED

SOFT = "rollout.soft"
# A one-hot input with the token's score: discrete thoughts under a budget of exactly so many.
DISCRETE = (f"{SOFT}.weight_floor=1.0", f"{SOFT}.tau=1.0", "algorithm.objective=censored")
MEAN = (f"{SOFT}.noise=mean", f"{SOFT}.tau=1.0", "algorithm.objective=token")
CENSORED = (f"{SOFT}.tau=1.0", f"{SOFT}.weight_floor=0.1", "algorithm.objective=censored")


@dataclass(frozen=True)
class Arm:
    """start: the supervised start. overrides: settings of rl.yaml. pathwise: trained by
    pathwise.py instead."""

    start: str
    overrides: tuple[str, ...]
    pathwise: bool = False


def multiplex(draws: int) -> tuple[str, ...]:
    return (
        f"{SOFT}.noise=multiplex",
        f"{SOFT}.noise_scale={draws}",
        f"{SOFT}.tau=1.0",
        "algorithm.objective=per_slot",
    )


def budget(thoughts: int) -> tuple[str, ...]:
    """Exactly so many thoughts, then an answer."""
    return (
        f"{SOFT}.min_soft_tokens={thoughts}",
        f"{SOFT}.max_soft_tokens={thoughts}",
        f"rollout.max_new_tokens={thoughts + 1}",
    )


def fillers(count: int, token: str) -> tuple[str, ...]:
    """So many fixed tokens, then an answer."""
    return (
        f"{SOFT}.enabled=false",
        f"{SOFT}.min_soft_tokens=0",
        f"rollout.filler_thoughts.count={count}",
        f"rollout.filler_thoughts.token={token}",
        "rollout.max_new_tokens=1",
    )


ARMS = {
    "discrete": Arm("path", DISCRETE),
    "discrete, listing": Arm("listing", (*DISCRETE, *budget(LISTED))),
    "filler": Arm("filler", fillers(HOPS, FILL)),
    "multiplex 8": Arm("mixture", multiplex(8)),
    "multiplex 32": Arm("mixture", multiplex(32)),
    "censored": Arm("mixture", CENSORED),
    "gumbel exact": Arm("mixture", (f"{SOFT}.tau=1.0", "algorithm.objective=exact")),
    "mean": Arm("mixture", MEAN),
    "mean, pathwise": Arm("mixture", MEAN, pathwise=True),
}
RATES = ("1e-4", "3e-4", "1e-3")
