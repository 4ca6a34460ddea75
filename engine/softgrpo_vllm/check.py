"""Bad requests end at their admission, for HTTP with status 400."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from softgrpo_engine.params import K_MAX
from softgrpo_vllm.keys import with_default
from softgrpo_vllm.request import SoftRequest

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams as Params


class SoftRequestCheck(LogitsProcessor):
    """Changes no logits. It is here for `validate_params`.

    default: keys of requests without any.
    """

    default: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Params) -> None:
        params = copy.copy(sampling_params)  # the caller's
        args = params.extra_args = with_default(params.extra_args, cls.default)
        request = SoftRequest.of(params)
        if request is None:
            return
        request.check()
        if params.n > 1 and "soft_seed" in args:
            raise ValueError(
                f"n={params.n} with soft_seed: the samples would be equal; send each with "
                "a soft_uid of its own, or take seed"
            )
        logprobs = params.logprobs
        if logprobs is not None and not 0 <= logprobs <= K_MAX:
            raise ValueError(f"logprobs={logprobs}: a soft position has at most {K_MAX} candidates")
        if params.logprob_token_ids:
            raise ValueError("logprob_token_ids: a soft position has its candidates' alone")

    def add_request(self, req_idx: int, sampling_params: Params) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        return logits


def check_with(default: Mapping[str, Any]) -> str:
    """The check by the name that vLLM's processes load it by. vLLM tells it nothing else, so the
    default stands in the name."""
    name = _WITH + json.dumps(default).encode().hex() if default else SoftRequestCheck.__name__
    return f"{__name__}:{name}"


_WITH = "SoftRequestCheck_"


def __getattr__(name: str) -> type[SoftRequestCheck]:
    if not name.startswith(_WITH):
        raise AttributeError(name)
    default = json.loads(bytes.fromhex(name.removeprefix(_WITH)))
    return type("SoftRequestCheck", (SoftRequestCheck,), {"default": default})
