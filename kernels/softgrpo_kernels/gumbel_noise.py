"""The Gumbel noise of recorded tokens again, for whoever needs log p back from g'."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels import noise
from softgrpo_kernels.backends import LIBRARY, backend_of
from softgrpo_kernels.checks import check_counter_words, check_integers, check_word
from softgrpo_kernels.cpu import gumbel_noise as cpu
from softgrpo_kernels.limits import LAST_WORD


def gumbel_noise(
    ids: Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    uid: int | Tensor,
    stream: int | Tensor = 0,
) -> Tensor:
    """The Gumbel noise that `soft_token` adds to these tokens, to the bit.

    Args:
        ids: int [..., K], token ids; slots < 0 get 0.
        seed, position, uid, stream: numbers or int64 tensors that broadcast against ids[..., 0].

    Returns:
        float32 [..., K]. On a device, NaN where a tensor there holds a bad position, uid or stream.

    Raises:
        ValueError: position, uid or stream outside 0 .. 2^32 - 1; a shape that does not fit.
    """
    check_integers("ids", ids)
    keys = {"seed": seed, "position": position, "uid": uid, "stream": stream}
    tensors = [_noise_key(name, key, ids) for name, key in keys.items()]
    return torch.ops.softgrpo_kernels.gumbel_noise(ids, *tensors)


def _noise_key(name: str, key: int | Tensor, ids: Tensor) -> Tensor:
    if not isinstance(key, Tensor):
        check_word(name, key)
        if name != "seed" and not 0 <= key <= LAST_WORD:
            raise ValueError(f"{name} must be in 0 .. 2^32 - 1 (take it modulo 2^32), not {key}")
        # Not a copy of a number from the host: a device would be waited for.
        return torch.full((), key, dtype=torch.int64, device=ids.device)
    check_integers(name, key)
    rows = ids.shape[:-1]
    fits = key.dim() <= len(rows) and all(
        have in (1, want) for have, want in zip(key.shape[::-1], rows[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {list(rows)}, not {list(key.shape)}")
    return key.to(device=ids.device, dtype=torch.int64)


def _op(ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor) -> Tensor:
    """All keys are int64 tensors."""
    if ids.is_cpu:
        check_counter_words(position, uid, stream)
    backend = backend_of("auto", ids.device) if ids.dim() > 0 else "reference"
    if backend == "cpu":
        return cpu.gumbel_noise(ids, seed, position, uid, stream)
    if backend == "triton":
        from softgrpo_kernels.gpu import gumbel_noise as gpu

        return gpu.gumbel_noise(ids, seed, position, uid, stream)
    return noise.gumbel_noise(ids, seed, position, uid, stream)


def _fake(ids: Tensor, *keys: Tensor) -> Tensor:
    return torch.empty(ids.shape, dtype=torch.float32, device=ids.device)


LIBRARY.define(
    "gumbel_noise(Tensor ids, Tensor seed, Tensor position, Tensor uid, Tensor stream) -> Tensor"
)
LIBRARY.impl("gumbel_noise", _op, "CompositeExplicitAutograd")
torch.library.register_fake("softgrpo_kernels::gumbel_noise", _fake)
