"""What a configuration asks of the device that it is to run on."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.utils.deterministic

from softgrpo.config import ConfigError, ConfigFile
from softgrpo_engine.training import group_attention


def device_type() -> str:
    """`cuda` or `cpu`: where the engines and, after them, the trainer put their weights."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(config: ConfigFile, device: str) -> None:
    """Raises ConfigError, one line with key and remedy, for what this type of device cannot train.

    It asks nothing but the configuration, so that it can be called before a model is looked for.
    """
    computed = getattr(torch, config.model.dtype) in group_attention.FLASH_DTYPES
    if device != "cpu" and not computed:
        raise ConfigError(
            f"model.dtype: {config.model.dtype} cannot be trained on a GPU, whose attention takes "
            "bfloat16 alone: set model.dtype=bfloat16, or hide the GPUs (CUDA_VISIBLE_DEVICES=-1) "
            "to train on the CPU"
        )


def make_deterministic() -> None:
    """Has this process add up in one order on a GPU: the same run gives the same bits again.

    It holds for all that the process computes from now on. An operator that cannot do so raises.
    """
    # Read when cuBLAS is first used: a workspace of its own for each stream.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # What nobody has written nobody reads: to fill it would be a launch for each tensor.
    memory: Any = torch.utils.deterministic  # whose properties are not typed
    memory.fill_uninitialized_memory = False
