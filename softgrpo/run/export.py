"""What a run leaves for others to load: a Hugging Face model directory, an adapter."""

from __future__ import annotations

import collections
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from softgrpo.distributed import World
from softgrpo.learner.lora import ADAPTER
from softgrpo.learner.sharding import full
from softgrpo.log.files import saving
from softgrpo_engine import SoftParams
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import save_pretrained

SOFT_SETTINGS_FILE = "softgrpo.json"


@saving("the model")
def export_model(
    tensors: Iterable[tuple[str, Tensor]],
    source: str | Path,
    target: str | Path,
    soft: SoftParams | None,
    world: World,
) -> None:
    """Writes a directory that transformers loads, replacing an older one only when complete.

    ``softgrpo.json`` in it holds the soft settings, which generation and evaluation use by default;
    a model trained on discrete rollouts has none. tensors: every parameter; all processes must
    take all of them, the first one writes.
    """
    if not world.is_first:
        collections.deque(tensors, maxlen=0)
        return
    target = Path(target)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_pretrained(tensors, source, temporary)
    if soft is not None:
        (temporary / SOFT_SETTINGS_FILE).write_text(
            json.dumps({"soft": soft.to_dict()}, indent=2) + "\n"
        )
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


@saving("the adapter")
def export_adapter(decoder: Decoder, base_model: str, target: Path, *, write: bool) -> None:
    """Writes the directory that ``peft.PeftModel.from_pretrained(model, target)`` loads.

    base_model: what the adapter belongs to, for its adapter_config.json. write: whether this
    process does; all must take part.
    """
    tensors = {}
    for name, parameter in decoder.named_parameters():
        if ".lora_" in name:
            # As peft writes them: those of its wrapper, without the name of the adapter.
            key = "base_model.model." + name.replace(f".{ADAPTER}.", ".")
            tensors[key] = full(parameter.detach()).cpu().contiguous()
    if write:
        target.mkdir(parents=True, exist_ok=True)
        peft_configs: Any = decoder.peft_config
        config = peft_configs[ADAPTER]
        config.base_model_name_or_path = base_model
        config.save_pretrained(str(target))
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
