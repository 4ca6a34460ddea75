"""Soft thinking in stock vLLM 0.32: a plug-in, on by --additional-config '{"softgrpo": true}'.

vLLM calls `register` in each of its processes, also where nobody asks for soft thinking: it imports
little, and without the setting all is as it was.
"""

from __future__ import annotations

VLLM = "0.32"  # the release whose seams are used; each is checked by tests/vllm_plugin


def why_not() -> str | None:
    """Why the vLLM that is installed is not the one that is known; None where it is."""
    import vllm

    if vllm.__version__.startswith(f"{VLLM}."):
        return None
    return f"softgrpo: no soft thinking, it knows vLLM {VLLM}.* and this is {vllm.__version__}"


def register() -> None:
    """Offers vLLM our models, the check of its configuration and a way for weights."""
    if reason := why_not():
        from vllm.logger import init_logger

        init_logger("vllm.softgrpo").warning(reason)
        return

    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from softgrpo_vllm.config import checked
    from softgrpo_vllm.models import TEXT_MODELS

    if getattr(MODELS_CONFIG_MAP.get("LlamaForCausalLM"), "softgrpo", False):
        return  # a second call
    for architecture in TEXT_MODELS:
        ModelRegistry.register_model(architecture, f"softgrpo_vllm.models:{architecture}")
    # Also of models that cannot think softly: they must say so.
    for architecture in ModelRegistry.get_supported_archs():
        previous = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        MODELS_CONFIG_MAP[architecture] = checked(previous)
    WeightTransferEngineFactory.register_engine(
        "softgrpo_file", "softgrpo_vllm.weights", "FileWeightTransferEngine"
    )
