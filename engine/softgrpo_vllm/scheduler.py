"""Prompt blocks are shared as ever; blocks that hold soft positions are those of their sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from softgrpo_vllm.config import default_keys
from softgrpo_vllm.keys import with_default
from softgrpo_vllm.request import is_soft

Hasher = Callable[[Request], list[Any]]


def soft_scheduler(**options: Any) -> Scheduler:
    """The scheduler of the kind that vLLM has decided for."""
    is_async = options["vllm_config"].scheduler_config.async_scheduling
    return (SoftAsyncScheduler if is_async else SoftScheduler)(**options)


def _salted(stock: Hasher, block_size: int, request: Request) -> list[Any]:
    """The hashes of new full blocks; those with a generated token hang on the request too.

    A block's name is its tokens', and a soft position's keys and values are not those of the token
    that it shows: a later text with the same tokens would be given them.
    """
    before, salt = len(request.block_hashes), request.request_id.encode()
    hashes = stock(request)
    for i, name in enumerate(hashes):
        if (before + i + 1) * block_size > request.num_prompt_tokens:
            hashes[i] = type(name)(hashlib.sha256(name + salt).digest())
    return hashes


class _Salted:
    """Part of a scheduler: gives requests the soft keys that they have by default, and salts what
    soft ones leave in the prefix cache."""

    def __init__(self, *, hash_block_size: int, **options: Any) -> None:
        super().__init__(hash_block_size=hash_block_size, **options)  # type: ignore[call-arg]
        self._soft_block_size = hash_block_size
        self._soft_default = default_keys(options["vllm_config"])

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if params is not None and self._soft_default:
            params.extra_args = with_default(params.extra_args, self._soft_default)
        stock = request._block_hasher
        if stock is not None and is_soft(params):
            request._block_hasher = partial(_salted, stock, self._soft_block_size)
        super().add_request(request)  # type: ignore[misc]


class SoftScheduler(_Salted, Scheduler):
    pass


class SoftAsyncScheduler(_Salted, AsyncScheduler):
    pass
