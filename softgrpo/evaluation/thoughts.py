"""What stands in the place of a model's thoughts: the controls of what they are worth."""

from __future__ import annotations

import dataclasses
from typing import Any

from softgrpo.config.rollout import FillerConfig

OWN, ARGMAX, FILLER = "own", "argmax", "filler"


def parse_thoughts(text: str | None, filler: FillerConfig) -> tuple[str, FillerConfig]:
    """The kind that ``--thoughts`` names, and the filler thoughts that go with it.

    text: `own`, `argmax`, `filler:N` or `filler:N:TOKEN`; None: as the model was trained, with the
    filler thoughts of its recipe if there are any. filler: those of the recipe; its token is the
    one of `filler:N`. Raises ValueError, one line.
    """
    none = dataclasses.replace(filler, count=0)
    if text is None:
        return (FILLER, filler) if filler.count else (OWN, none)
    kind, _, rest = text.partition(":")
    count, _, token = rest.partition(":")
    if text in (OWN, ARGMAX):
        return text, none
    if kind == FILLER and count.isdecimal() and int(count) > 0:
        return FILLER, FillerConfig(int(count), token or filler.token)
    raise ValueError(
        f"--thoughts {text!r} is not allowed: must be own, argmax, or filler:N with N >= 1, which "
        "may name its token: filler:8:."
    )


def modes_of(kind: str, given: str | None) -> list[str]:
    """The modes that ``--mode`` names, without it those that these thoughts have; raises ValueError
    for one that is none, or that does not go with them."""
    modes = ["discrete"] if kind == FILLER else ["soft", "discrete"]
    if given is not None:
        names = "soft,discrete" if given == "both" else given
        modes = list(dict.fromkeys(mode.strip() for mode in names.split(",")))
    wrong = next((mode for mode in modes if mode not in ("soft", "discrete")), None)
    if wrong is not None:
        raise ValueError(f"--mode {wrong!r} is not allowed: must be soft, discrete or both")
    if kind == FILLER and "soft" in modes:
        raise ValueError(
            "filler thoughts take the place of soft ones, a discrete answer follows: give "
            "--mode discrete, or --thoughts own"
        )
    if kind == ARGMAX and "soft" not in modes:
        raise ValueError("--thoughts argmax replaces soft thoughts: give --mode soft")
    return modes


def thoughts_label(settings: dict[str, Any]) -> str:
    """The thoughts of an evaluation's settings, for people."""
    filler = settings["filler_thoughts"]
    return {
        OWN: "the model's own",
        ARGMAX: "the heaviest candidate of each mixture",
        FILLER: f"{filler['count']} filler tokens {filler['token']!r}",
    }[settings["thoughts"]]
