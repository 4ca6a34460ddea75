"""The flat keys for soft tokens, as bodies have them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from softgrpo.serve.errors import ApiError
from softgrpo.serve.fields import Fields, wrong
from softgrpo_engine import SoftParams
from softgrpo_engine.requests.soft_keys import INTEGERS, NAMES, NUMBERS, SOFT_KEYS


def soft_fields(body: Fields) -> Fields:
    """The soft keys of a body, at its top level or in ``vllm_xargs``; an unknown one is a 400."""
    extra = body.values.get("vllm_xargs", {})
    if not isinstance(extra, dict):
        raise wrong("vllm_xargs", extra, "an object")
    found = {
        name: value
        for name, value in {**extra, **body.values}.items()
        if name == "soft" or name.startswith("soft_")
    }
    for name in found:
        if name not in SOFT_KEYS:
            raise ApiError(400, f"unknown soft setting {name!r:.60}", name)
    return Fields(found)


def soft_params(keys: Fields, default: SoftParams | None) -> SoftParams | Literal[False]:
    """How soft positions are drawn, False for none. default: that of the server.

    Raises ApiError, or the ValueError of SoftParams.
    """
    is_soft = keys.boolean("soft") if "soft" in keys else default is not None
    changes = _changes(keys)
    if not is_soft:
        for name in sorted(keys.values.keys() - {"soft", *NAMES} if "soft" not in keys else ()):
            raise ApiError(400, f"{name} is a setting of soft tokens: add soft=1", name)
        return False
    return dataclasses.replace(default or SoftParams(), **changes)


def _changes(keys: Fields) -> dict[str, Any]:
    changes: dict[str, Any] = {field: keys.integer(key) for key, field in INTEGERS.items()}
    changes |= {field: keys.number(key) for key, field in NUMBERS.items()}
    changes["noise"] = keys.string("soft_noise")
    end = keys.values.get("soft_end_of_thinking")
    if isinstance(end, bool) or not isinstance(end, str | int | None):
        raise wrong("soft_end_of_thinking", end, "a token or its id")
    changes["end_of_thinking"] = end
    low, high = keys.number("soft_clip_low"), keys.number("soft_clip_high")
    if (low is None) != (high is None):
        raise ApiError(400, "soft_clip_low and soft_clip_high go together", "soft_clip_low")
    changes["noise_clip"] = None if low is None else (low, high)
    return {name: value for name, value in changes.items() if value is not None}
