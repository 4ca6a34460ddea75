"""Reading and writing Hugging Face safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder, rope_parameters

_TOKENIZER_AND_CONFIG = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def load_decoder(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Decoder:
    """A Decoder with the weights of a local Hugging Face model directory."""
    decoder = empty_decoder(DecoderConfig.from_pretrained(path), dtype, device)
    load_weights(decoder, read_weights(path))
    return decoder


def empty_decoder(config: DecoderConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """A Decoder whose weights are still to be loaded; on the device "meta" it takes no memory."""
    decoder = meta_decoder(config, dtype)
    allocate(decoder, device)
    return decoder


def meta_decoder(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """A Decoder whose weights have no memory before `allocate`, so that they can be changed or
    sharded before; its buffers are on the CPU."""
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    frequencies, decoder.rope_scale = rope_parameters(config)
    decoder.register_buffer("inverse_frequencies", frequencies, persistent=False)
    return decoder


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Gives tensors without memory one on the device, uninitialised, and moves the others there."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


class StoredTensor(Protocol):
    """A tensor in a file: what is read is what is asked for, rows by ``[first:end]``."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


def stored_weights(path: str | Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yields (name, what can be read) of every ``*.safetensors`` file of a directory."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors file in {path}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_slice(name)


def read_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every ``*.safetensors`` file of a directory, one by one."""
    return ((name, stored[:]) for name, stored in stored_weights(path))


@torch.no_grad()
def load_weights(
    decoder: Decoder,
    named_tensors: Iterator[tuple[str, Tensor]],
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Copies tensors with Hugging Face names into the decoder's parameters, in place.

    parameters: by those names; the decoder's own by default. None of the tensors is held while the
    next one is made. Raises ValueError for an unknown name, a wrong shape, or a parameter that did
    not come.
    """
    if parameters is None:
        parameters = dict(decoder.named_parameters())
    missing = set(parameters)
    for name, tensor in named_tensors:
        if name == "lm_head.weight" and decoder.config.tie_word_embeddings:
            continue
        if name not in parameters:
            raise ValueError(f"weight {name!r} does not belong to this model")
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"weight {name!r} has shape {list(tensor.shape)}, "
                f"the model has {list(parameters[name].shape)}"
            )
        parameters[name].copy_(tensor)
        del tensor
        missing.discard(name)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first: {sorted(missing)[0]!r}")


def save_pretrained(
    named_tensors: Iterable[tuple[str, Tensor]],
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a model directory that transformers loads.

    named_tensors: its weights, with Hugging Face names. Config, tokenizer and
    chat template are copied from ``source``, the model directory it was loaded from.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_AND_CONFIG:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Copies: the weights of an engine can be parts of larger tensors, which safetensors refuses.
    state = {name: t.detach().to("cpu", dtype, copy=True) for name, t in named_tensors}
    save_torch_state_dict(state, str(target))
