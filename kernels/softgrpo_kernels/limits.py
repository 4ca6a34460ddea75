"""Limits that all back ends have."""

from __future__ import annotations

import torch

MAX_CANDIDATES = 64

# Divisors. A denormal one overflows its reciprocal, and some hardware takes it for 0.
SMALLEST = torch.finfo(torch.float32).smallest_normal
LARGEST = torch.finfo(torch.float32).max
LAST_WORD = 0xFFFFFFFF
# Draws after the first count in the upper half of the word of the stream.
LAST_STREAM_OF_DRAWS = 0xFFFF
