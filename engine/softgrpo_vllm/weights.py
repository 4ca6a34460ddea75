"""Weights by a safetensors file in memory: for engines that share no GPU with the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class FileInit(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A part of the weights, by their names in Hugging Face's files."""

    path: str


class FileWeightTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """vLLM's weight update ("softgrpo_file"): start, any number of files, finish."""

    init_info_cls, update_info_cls = FileInit, FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        # vLLM's parameters that have not come yet. It would keep the old ones, with a warning.
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        with safe_open(update_info.path, "pt") as file:
            names = file.keys()
            loaded = self.model.load_weights((name, file.get_tensor(name)) for name in names)
        # A few models do not say.
        self._missing -= self._missing if loaded is None else set(loaded)

    def finish_weight_update(self) -> None:
        if self._missing:
            raise ValueError(
                f"no new weights came for {min(self._missing)} of {type(self.model).__name__}"
                f" ({len(self._missing)} missing): the names are not those of its checkpoints"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type != "cpu":
            return
        # On a CPU vLLM 0.32 multiplies by a packed copy of the head, and a tied one keeps that of
        # the old table: logits that are wrong, without an error.
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass
