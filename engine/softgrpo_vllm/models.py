"""vLLM's own models of text, unchanged but for the state that prepares their inputs and draws.

`softgrpo_vllm.models.LlamaForCausalLM` is made when vLLM asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.model_executor.models.registry import (
    _TEXT_GENERATION_MODELS as TEXT_MODELS,
)

from softgrpo_vllm.config import is_on

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["TEXT_MODELS"]


def __getattr__(name: str) -> type[Any]:
    if name not in TEXT_MODELS:
        raise AttributeError(name)
    module, class_name = TEXT_MODELS[name]
    path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    made = _with_soft_state(name, getattr(importlib.import_module(path), class_name))
    globals()[name] = made
    return made


def _with_soft_state(name: str, base: type[Any]) -> type[Any]:
    """A subclass of a model: with soft thinking it brings `SoftModelState`."""

    class SoftModel(base):
        sampled_hidden: Tensor | None = None
        """[R, H], those that the logits were last computed from."""
        weight_updates = 0

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            # Of the instance: without soft thinking vLLM finds the state as ever.
            if is_on(vllm_config):
                self.get_model_state_cls = lambda: _state_class(self, base)

        def compute_logits(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            self.sampled_hidden = hidden_states
            return super().compute_logits(hidden_states, *args, **options)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any) -> Any:
            self.weight_updates += 1
            return super().load_weights(weights, *args)

    SoftModel.__name__ = SoftModel.__qualname__ = name
    return SoftModel


def _state_class(model: Any, base: type[Any]) -> type[Any]:
    """Raises ValueError for a model that needs another one."""
    from vllm.model_executor.models.interfaces import requires_raw_input_tokens

    if hasattr(base, "get_model_state_cls") or requires_raw_input_tokens(model):
        raise ValueError(
            f"softgrpo: no soft thinking with {base.__name__}: its inputs are more than embeddings "
            "of tokens; take another model"
        )
    from softgrpo_vllm.state import SoftModelState

    return SoftModelState
