"""vLLM's own models of text, unchanged but for the state that prepares their inputs and draws.

`softgrpo_vllm.models.LlamaForCausalLM` is made when vLLM asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from vllm.model_executor.models.registry import (
    _TEXT_GENERATION_MODELS as TEXT_MODELS,
)

from softgrpo_vllm.config import is_on

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["TEXT_MODELS"]


class HeadProduct(NamedTuple):
    """What the logits [R, V] were last computed from: hidden [R, H], as the head was given them,
    for a model may still norm or scale them in `compute_logits`; its bias, or None."""

    head: nn.Module
    hidden: Tensor
    bias: Tensor | None
    logits: Tensor


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
        head_product: HeadProduct | None = None
        """None where the logits are more than a product."""
        weight_updates = 0

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            # Of the instance: without soft thinking vLLM finds the state as ever.
            if is_on(vllm_config):
                self.get_model_state_cls = lambda: _state_class(self, base)
                processor = getattr(self, "logits_processor", None)
                if processor is not None and processor.soft_cap is None and processor.scale == 1:
                    processor.register_forward_hook(self._keep_product, with_kwargs=True)

        def _keep_product(
            self, processor: nn.Module, args: tuple[Any, ...], options: dict[str, Any], logits: Any
        ) -> None:
            if not options:
                head, hidden, bias, *_ = *args, None
                self.head_product = HeadProduct(head, hidden, bias, logits)

        def compute_logits(self, *args: Any, **options: Any) -> Any:
            self.head_product = None
            logits = super().compute_logits(*args, **options)
            if self.head_product is not None and self.head_product.logits is not logits:
                self.head_product = None
            return logits

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
