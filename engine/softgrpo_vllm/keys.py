"""Soft settings as the flat keys of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softgrpo_engine.params import SoftParams
from softgrpo_engine.requests.prompts import thinking_end_id

# Fields of SoftParams that are keys by their name.
_SAME = ("top_k", "top_p", "temperature", "tau", "weight_floor", "noise", "noise_scale", "eps")


def keys_of(soft: SoftParams, tokenizer: Any) -> dict[str, Any]:
    """The keys of a request that thinks so. Raises ValueError for what vLLM cannot do."""
    if soft.cold_stop_entropy is not None or soft.switch_window is not None:
        raise ValueError("vLLM knows no rules of entropy: take the engine native or softgrpo-serve")
    end = thinking_end_id(soft.end_of_thinking, tokenizer)
    if end is not None and end < 0:
        raise ValueError(f"end_of_thinking is {end}, which is no token")
    keys = {"soft": 1} | {f"soft_{name}": getattr(soft, name) for name in _SAME}
    keys["soft_end_of_thinking"] = -1 if end is None else end
    keys["soft_min_tokens"] = soft.min_soft_tokens
    if soft.max_soft_tokens is not None:
        keys["soft_max_tokens"] = soft.max_soft_tokens
    if soft.noise_clip is not None:
        keys |= {"soft_clip_low": soft.noise_clip[0], "soft_clip_high": soft.noise_clip[1]}
    return keys


def with_default(keys: dict[str, Any] | None, default: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a request of a server that has some of its own; with soft=0 they are not for
    it."""
    keys = keys or {}
    return {**default, **keys} if keys.get("soft", 1) else keys
