"""The soft keys of a request: `SamplingParams.extra_args`, over HTTP `vllm_xargs`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softgrpo_engine.execution.record import discrete_values, soft_values
from softgrpo_engine.params import K_MAX, SamplingParams, SoftParams
from softgrpo_engine.requests.admission import check_noise_keys, check_thoughts_fit
from softgrpo_engine.requests.prompts import default_uids, thinking_end_id
from softgrpo_engine.requests.soft_keys import INTEGERS, NUMBERS, SOFT_KEYS
from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_kernels.row_rules import check_numbers

if TYPE_CHECKING:
    from vllm import SamplingParams as Params

# Rules of entropy need it on the host at each step, which stock vLLM does not wait for.
_OF_OUR_ENGINE = ("soft_cold_stop_entropy", "soft_cold_stop_steps", "soft_switch_window",
                  "soft_max_switches")  # fmt: skip


def is_soft(params: Params | None) -> bool:
    """Whether a request asks for soft thinking; it has been checked."""
    return bool(params is not None and (params.extra_args or {}).get("soft"))


@dataclass(frozen=True)
class SoftRequest:
    """What a request asks for.

    soft: None with soft_max_tokens=0: discrete, and all else as in a soft one. params: of discrete
    positions. ends: tokens that end the sample. seed, uid: None where the request does not say.
    kept_mass: it is reported.
    """

    soft: SoftParams | None
    params: SamplingParams
    ends: frozenset[int]
    seed: int | None
    uid: int | None
    stream: int
    kept_mass: bool

    @classmethod
    def of(cls, params: Params) -> SoftRequest | None:
        """None for a request without soft thinking. Raises ValueError for keys that say nothing."""
        keys = {k: v for k, v in (params.extra_args or {}).items() if k.startswith("soft")}
        _check_names(keys)
        if not keys.get("soft"):
            return None
        seed = params.seed
        ends = set(params.stop_token_ids or ())
        if params.eos_token_id is not None and not params.ignore_eos:
            ends.add(params.eos_token_id)
        return cls(
            soft=None if keys.get("soft_max_tokens") == 0 else _soft_params(keys),
            params=_discrete_params(params),
            ends=frozenset(ends),
            seed=_integer(keys, "soft_seed", None if seed is None else seed % 2**64),
            uid=_integer(keys, "soft_uid", None),
            stream=_integer(keys, "soft_stream", 0) or 0,
            kept_mass=bool(keys.get("soft_kept_mass")),
        )

    def sequence(self, request_id: str, row: int, prompt: list[int], tokenizer: Any) -> Sequence:
        """The sample as our record knows it. Without a seed its noise is that of its id, equal on
        all ranks."""
        seed, uid, soft = self.seed, self.uid, self.soft
        if seed is None:
            seed = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "little")
        return Sequence(
            uid=default_uids(prompt, 1)[0] if uid is None else uid,
            seed=seed,
            stream=self.stream,
            group=0,
            prompt=prompt,
            params=self.params,
            soft=soft,
            end_ids=self.ends,
            thinking_end=thinking_end_id(soft.end_of_thinking, tokenizer) if soft else None,
            slots=self.slots,
            row=row,
        )

    @property
    def slots(self) -> int:
        """Candidates of a position that may be recorded."""
        top_k = self.params.top_k
        return max(top_k if 1 <= top_k <= K_MAX else 1, self.soft.top_k if self.soft else 1)

    def check(self) -> None:
        """Raises ValueError for numbers that no step could compute."""
        sequence = replace(self, uid=self.uid or 0).sequence("", 0, [0], None)
        check_noise_keys(sequence.seed, [[sequence.uid]], self.stream, self.soft)
        check_thoughts_fit(self.params, self.soft)
        check_numbers(discrete_values(sequence), K_MAX)
        if self.soft is not None:
            check_numbers(soft_values(sequence), K_MAX)


def _check_names(keys: dict[str, Any]) -> None:
    for name in keys:
        if name in _OF_OUR_ENGINE:
            raise ValueError(f"{name}: vLLM knows no rules of entropy; take softgrpo-serve")
        if name not in SOFT_KEYS and name != "soft_kept_mass":
            raise ValueError(f"unknown soft setting {name!r:.60}")
    if keys.get("soft", 0) not in (0, 1):
        raise ValueError(f"soft={keys['soft']!r:.60} is not allowed: must be 0 or 1")
    others = sorted(keys.keys() - {"soft"})
    if others and "soft" not in keys:
        raise ValueError(f"{others[0]} is a setting of soft tokens: add soft=1")


def _soft_params(keys: dict[str, Any]) -> SoftParams:
    settings: dict[str, Any] = {
        field: _integer(keys, key, None) for key, field in INTEGERS.items() if key in keys
    }
    settings |= {field: _number(keys, key) for key, field in NUMBERS.items() if key in keys}
    if "soft_noise" in keys:
        settings["noise"] = keys["soft_noise"]
    if "soft_clip_low" in keys or "soft_clip_high" in keys:
        settings["noise_clip"] = _number(keys, "soft_clip_low"), _number(keys, "soft_clip_high")
    end = keys.get("soft_end_of_thinking", "auto")
    if end != "auto":
        # A text cannot be looked up here: the front end's check has no tokenizer.
        end = _integer(keys, "soft_end_of_thinking", None)
        settings["end_of_thinking"] = None if end == -1 else end
    return SoftParams(**settings)


def _discrete_params(params: Params) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k if params.top_k > 0 else -1,
        min_p=params.min_p,
        max_tokens=params.max_tokens or 2**31,
    )


def _integer(keys: dict[str, Any], name: str, default: int | None) -> int | None:
    value = keys.get(name, default)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    hint = ", the token's id, -1 or auto" if name == "soft_end_of_thinking" else ""
    raise ValueError(f"{name}={value!r:.60} is not allowed: must be an integer{hint}")


def _number(keys: dict[str, Any], name: str) -> float:
    value = keys.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r:.60} is not allowed: must be a number")
    return float(value)
