"""The Hugging Face model directory that a run leaves."""

from __future__ import annotations

import collections
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from softgrpo.distributed import World
from softgrpo.run_folder import saving
from softgrpo_engine import SoftParams
from softgrpo_engine.weights import save_pretrained

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
