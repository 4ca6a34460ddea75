"""Integers in the order of numbers, and of candidates; as `gpu.soft_token.keys`."""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -(2**63)
LAST_ID = 2**31 - 1
# The order of -inf.
LOWEST = -2139095041


def order_of(value: Tensor) -> Tensor:
    """int32 in the order of fp32 numbers; both zeros get one."""
    bits = (value + 0.0).view(torch.int32)  # -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def number_of(order: Tensor) -> Tensor:
    """The fp32 number of an int32 order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)


def key_of(value: Tensor, token: Tensor) -> Tensor:
    """int64 keys: value descending, id ascending is key descending."""
    return (order_of(value).long() << 32) | (LAST_ID - token)


def value_of(key: Tensor) -> Tensor:
    return number_of((key >> 32).int())


def token_of(key: Tensor) -> Tensor:
    return LAST_ID - (key & LAST_ID)
