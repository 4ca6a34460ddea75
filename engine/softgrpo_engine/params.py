"""What a caller asks of the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

K_MAX = 64  # most candidates that the kernels record for one position


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is not allowed: must be {allowed}")


@dataclass(frozen=True)
class SamplingParams:
    """How discrete tokens are drawn, and when a sample ends.

    n: samples a prompt. temperature 0 is greedy. top_p 1 and top_k <= 0 keep the whole vocabulary.
    min_p: relative to the most likely token. max_tokens, min_tokens: generated tokens. seed: None
    draws a fresh one for the call. stop: strings that end a sample and are cut from its text.
    stop_token_ids: ids that end it, beside the model's own. ignore_eos: only the length ends it.
    kept_mass: `Sample.kept_mass` is wanted.
    prompt_logprobs: also give log p of the prompt's tokens, and so many most likely tokens at each;
    such a prompt is computed whole, not found in the cache.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    kept_mass: bool = False
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.n >= 1, "n", self.n, ">= 1")
        _require(
            0 <= self.temperature < math.inf, "temperature", self.temperature, "finite and >= 0"
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "> 0 and <= 1")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, ">= 0 and < 1")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, ">= 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f">= 0 and <= max_tokens ({self.max_tokens})",
        )
        if self.seed is not None:
            _require(0 <= self.seed < 2**64, "seed", self.seed, ">= 0 and < 2^64")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _require(all(self.stop), "stop", self.stop, "non-empty strings")
        top = self.prompt_logprobs
        _require(top is None or 0 <= top <= K_MAX, "prompt_logprobs", top, f">= 0 and <= {K_MAX}")


@dataclass(frozen=True)
class SoftParams:
    """How soft positions are drawn (ALGORITHM.md section 1).

    tau: temperature of the Gumbel-Softmax. weight_floor: a weight below so much of the largest is
    0. noise, noise_scale: the method, as in `softgrpo_kernels.soft_token`, which says what goes
    with tau 1 and has no floor; or "embedding", for Gaussian noise on the mixture (Soft Tokens,
    arXiv 2509.19170) whose standard deviation is noise_scale times the root mean square of the
    embedding table, without a floor. noise_clip:
    bounds of the Gumbel noise, and eps: floor added to the probabilities, which keeps all top_k
    slots live; both are of the `official` objective. end_of_thinking: "auto" is the tokenizer's
    </think> if it has one; a token, its id, or None for never. max_soft_tokens: budget, after
    which the end of thinking is forced. min_soft_tokens: positions before which neither thinking
    nor the sample may end; equal to the budget, thinking has exactly so many positions.

    Inference only, for the choice is not in the density that a policy is trained with:
    cold_stop_entropy, cold_stop_steps: the end of thinking is forced, or the rest is discrete,
    after so many soft positions in a row of less entropy (nats; Soft Thinking's cold stop, arXiv
    2505.15778). switch_window: thinking is soft or discrete by its entropy, discrete for at least
    so many positions at a time (SwiReasoning, arXiv 2510.05069, with noise "none" and tau 1);
    max_switches: after so many its end is forced.
    """

    top_k: int = 5
    top_p: float = 0.95
    temperature: float = 1.0
    tau: float = 0.1
    weight_floor: float = 0.0
    noise: str = "gumbel"
    noise_scale: float = 1.0
    noise_clip: tuple[float, float] | None = None
    eps: float = 0.0
    end_of_thinking: str | int | None = "auto"
    max_soft_tokens: int | None = None
    min_soft_tokens: int = 0
    cold_stop_entropy: float | None = None
    cold_stop_steps: int = 256
    switch_window: int | None = None
    max_switches: int | None = None

    def __post_init__(self) -> None:
        _require(1 <= self.top_k <= K_MAX, "soft top_k", self.top_k, f">= 1 and <= {K_MAX}")
        _require(0 < self.top_p <= 1, "soft top_p", self.top_p, "> 0 and <= 1")
        _require(
            0 < self.temperature < math.inf, "soft temperature", self.temperature, "finite and > 0"
        )
        _require(0 < self.tau < math.inf, "tau", self.tau, "finite and > 0")
        _require(0 <= self.weight_floor <= 1, "weight_floor", self.weight_floor, ">= 0 and <= 1")
        # Not at the top: the scheduler, which knows these parameters, knows no torch.
        from softgrpo_kernels.methods import SOFT_NOISES, method_of

        _require(self.noise in SOFT_NOISES, "noise", self.noise, " or ".join(SOFT_NOISES))
        _require(0 < self.noise_scale < math.inf, "noise_scale", self.noise_scale, "> 0")
        method = method_of(self.noise)
        if method.refuses_scale(self.noise_scale):
            raise ValueError(f"noise_scale={self.noise_scale}: {method.scale_rule}")
        if method.why_no_floor and self.weight_floor:
            raise ValueError(
                f"weight_floor={self.weight_floor}: {self.noise} has none, as "
                f"{method.why_no_floor}; set weight_floor=0"
            )
        _require(0 <= self.eps < 1, "eps", self.eps, ">= 0 and < 1")
        if self.noise_clip is not None:
            low, high = self.noise_clip
            _require(low < high, "noise_clip", self.noise_clip, "(low, high) with low < high")
            object.__setattr__(self, "noise_clip", (low, high))
        if self.max_soft_tokens is not None:
            _require(self.max_soft_tokens >= 1, "max_soft_tokens", self.max_soft_tokens, ">= 1")
        budget = math.inf if self.max_soft_tokens is None else self.max_soft_tokens
        _require(
            0 <= self.min_soft_tokens <= budget,
            "min_soft_tokens",
            self.min_soft_tokens,
            f">= 0 and <= max_soft_tokens ({self.max_soft_tokens})",
        )
        self._check_entropy_rules()

    def _check_entropy_rules(self) -> None:
        entropy, window, most = self.cold_stop_entropy, self.switch_window, self.max_switches
        _require(entropy is None or 0 < entropy < math.inf, "cold_stop_entropy", entropy, "> 0")
        _require(self.cold_stop_steps >= 1, "cold_stop_steps", self.cold_stop_steps, ">= 1")
        _require(window is None or window >= 1, "switch_window", window, ">= 1")
        _require(most is None or most >= 0, "max_switches", most, ">= 0")
        if most is not None and window is None:
            raise ValueError(f"max_switches={most} needs switch_window, such as 512")
        if entropy is not None and window is not None:
            raise ValueError("cold_stop_entropy and switch_window are two rules: give one of them")

    @property
    def mixture(self) -> tuple[float, float]:
        """What `soft_weights` makes the weights of."""
        return self.tau, self.weight_floor

    def to_dict(self) -> dict[str, Any]:
        """As it stands in softgrpo.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SoftParams:
        """Reads what ``to_dict`` wrote; an unknown key is an error."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown soft setting {sorted(unknown)[0]!r}")
        return cls(**values)

    @classmethod
    def of_model(cls, path: Path) -> SoftParams | None:
        """The settings that a model directory was exported with (softgrpo.json), None without."""
        file = path / "softgrpo.json"
        if not file.exists():
            return None
        try:
            return cls.from_dict(json.loads(file.read_text())["soft"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
