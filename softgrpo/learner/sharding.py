"""Weights that are spread over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from softgrpo.distributed import World


def shard(
    module: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype | None, world: World
) -> None:
    """Spreads the weights over the processes (FSDP2), in place; over several nodes every node
    holds all of them (HSDP).

    The blocks are gathered one by one as they are needed, in `dtype` (None: in their own); what
    belongs to none of them (embeddings, last norm, head) for the whole pass, as it is. All
    processes must run the same number of passes.
    """
    if world.size == 1:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("shard",) if world.nodes == 1 else ("replicate", "shard")
    shape = (world.size,) if world.nodes == 1 else (world.nodes, world.size // world.nodes)
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over the processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
