"""Gumbel noise in Triton; meaning: `softgrpo_kernels.gumbel_noise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.noise import NoiseKey, gumbel
from softgrpo_kernels.tensors import int32

BLOCK = 256


@triton.jit(do_not_specialize=["slots"])
def gumbel_noise_kernel(out, ids, seed, position, uid, stream, slots, BLOCK: tl.constexpr):
    """Program (i, b): block b of row i."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row * slots + slot, mask=slot < slots, other=-1)
    key = NoiseKey(
        tl.load(seed + row), tl.load(position + row), tl.load(uid + row), tl.load(stream + row)
    )
    noise = gumbel(token, key)
    # A word that does not fit would alias another sample's noise.
    fits = (key.position | key.uid | key.stream) >> 32 == 0
    noise = tl.where(token >= 0, tl.where(fits, noise, float("nan")), 0.0)
    tl.store(out + row * slots + slot, noise, mask=slot < slots)


def gumbel_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """Noise fp32 of ids [..., K]; the keys, int64, broadcast against ids[..., 0]."""
    ids = int32(ids)
    keys = [key.expand(ids.shape[:-1]).contiguous() for key in (seed, position, uid, stream)]
    out = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    if out.numel():
        slots = ids.shape[-1]
        grid = (ids.numel() // slots, triton.cdiv(slots, BLOCK))
        gumbel_noise_kernel[grid](out, ids, *keys, slots, BLOCK=BLOCK, enable_fp_fusion=False)
    return out
