"""The optimizer of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from softgrpo.config import ConfigError
from softgrpo.config.sections import AdamWConfig


def make_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; adamw_8bit keeps its moments in 8 bits
    (arXiv 2110.02861): 2 bytes a parameter instead of 8."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw_8bit":
        if any(isinstance(p, DTensor) for p in parameters):
            raise ConfigError(
                "optim.name: adamw_8bit (bitsandbytes) runs in one process; set optim.name=adamw"
            )
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)
        return optimizer
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, fused=fused, **options)
