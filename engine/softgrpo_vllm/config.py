"""What vLLM must be for soft thinking: checked and set before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def is_on(vllm_config: VllmConfig) -> bool:
    """Whether soft thinking was asked for. Raises ValueError for a setting that is none."""
    return _setting(vllm_config) is not False


def default_keys(vllm_config: VllmConfig) -> dict[str, Any]:
    """The soft keys that requests have by default, once `checked` has seen the configuration."""
    setting = _setting(vllm_config)
    return setting["default"] or {} if isinstance(setting, dict) else {}


def _setting(vllm_config: VllmConfig) -> bool | dict[str, Any]:
    extra = vllm_config.additional_config
    wanted = extra.get("softgrpo", False) if isinstance(extra, dict) else False
    if wanted in (True, False):
        return bool(wanted)
    if (
        isinstance(wanted, dict)
        and wanted.keys() == {"default"}
        and isinstance(wanted["default"], bool | dict)
    ):
        return wanted
    raise ValueError(
        f'additional_config: softgrpo={wanted!r} must be true or false, or {{"default": true}}'
    )


def checked(previous: type[Any]) -> type[Any]:
    """An entry of vLLM's MODELS_CONFIG_MAP that first does what the previous one does."""

    class SoftConfig(previous):
        softgrpo: ClassVar[bool] = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
            super().verify_and_update_config(vllm_config)
            if is_on(vllm_config):
                _check(vllm_config)
                _update(vllm_config)

    return SoftConfig


def _check(vllm_config: VllmConfig) -> None:
    """Raises ValueError, with the first reason, where soft thinking would be wrong."""
    for reason, advice in _reasons(vllm_config):
        raise ValueError(f"softgrpo: no soft thinking with {reason}: {advice}")


def _reasons(vllm_config: VllmConfig) -> Iterator[tuple[str, str]]:
    """(what does not go with it, what to do)."""
    from softgrpo_vllm.models import TEXT_MODELS

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not vllm_config.use_v2_model_runner:
        yield "vLLM's V1 runner", "it needs Model Runner V2, on a GPU with Triton"
    if model.architecture not in TEXT_MODELS or model.is_hybrid or model.is_attention_free:
        yield f"the architecture {model.architecture}", "take a decoder of text with attention"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding", "leave out --speculative-config"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism", "take --tensor-parallel-size instead"
    if parallel.prefill_context_parallel_size > 1:
        yield "prefill context parallelism", "set its size to 1"
    if parallel.use_ubatching:
        yield "dual batch overlap", "leave out --enable-dbo"
    if vllm_config.lora_config is not None:
        yield "LoRA", "merge the adapter into the model"
    if vllm_config.kv_transfer_config is not None:
        yield "transfers of the KV cache", "leave out --kv-transfer-config"
    if model.return_sampling_mask or model.enable_trace_replay:
        yield "replay of samples", "the record of a soft request replays it"
    if vllm_config.scheduler_config.scheduler_cls is not None:
        yield "a scheduler of your own", "leave out --scheduler-cls"


def _update(vllm_config: VllmConfig) -> None:
    from softgrpo_vllm.check import check_with

    # It splits rows over ranks; all of them need what was drawn.
    vllm_config.parallel_config.enable_batch_sharded_sampling = False
    vllm_config.scheduler_config.scheduler_cls = "softgrpo_vllm.scheduler.soft_scheduler"
    default = _find_default(vllm_config)
    model = vllm_config.model_config
    model.logits_processors = [*(model.logits_processors or ()), check_with(default)]
    if default:  # in a dictionary of our own: the other one may be the caller's
        setting = {"softgrpo": {"default": default}}
        vllm_config.additional_config = {**vllm_config.additional_config, **setting}


def _find_default(vllm_config: VllmConfig) -> dict[str, Any]:
    """The soft keys that requests have by default. Raises ValueError, one line, for bad ones."""
    from vllm import SamplingParams

    from softgrpo_vllm.request import SoftRequest

    setting = _setting(vllm_config)
    default = setting["default"] if isinstance(setting, dict) else False
    try:
        if default is True:
            default = _keys_of_model(vllm_config.model_config)
        if not default:
            return {}
        default = {"soft": 1} | default
        request = SoftRequest.of(SamplingParams(max_tokens=None, extra_args=default))
        if request is None:
            raise ValueError("soft=0: leave the default out")
        request.check()
    except ValueError as error:
        raise ValueError(f"softgrpo: no default for requests: {error}") from error
    return default


def _keys_of_model(model: ModelConfig) -> dict[str, Any]:
    """What the model was exported with."""
    from vllm.tokenizers import cached_tokenizer_from_config

    from softgrpo_engine.params import SoftParams
    from softgrpo_vllm.keys import keys_of

    soft = SoftParams.of_model(Path(model.model))
    if soft is None:
        raise ValueError(
            f"{model.model} has no softgrpo.json: give the soft keys in the place of true, such as "
            '{"soft_tau": 0.1}'
        )
    return keys_of(soft, None if model.skip_tokenizer_init else cached_tokenizer_from_config(model))
