"""What a configuration asks of the device that it is to run on."""

from __future__ import annotations

import torch

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
