"""Reinforcement learning of soft-thinking language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softgrpo.config import Config

if TYPE_CHECKING:
    from softgrpo.trainer import Trainer

__all__ = ["Config", "Trainer"]


def __getattr__(name: str) -> Any:
    # The trainer imports torch and transformers; reading a configuration needs neither.
    if name == "Trainer":
        from softgrpo.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'softgrpo' has no attribute {name!r}")
