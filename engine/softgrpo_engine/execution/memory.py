"""How many KV pages to make, and giving memory back."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from pathlib import Path

import torch

from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE
from softgrpo_engine.scheduling.sequence import pages_for

_SHARE_OF_FREE_MEMORY = 0.25


def page_bytes(decoder: Decoder) -> int:
    """Bytes of one page: keys and values of all layers."""
    config = decoder.config
    values = config.num_layers * config.num_kv_heads * PAGE_SIZE * config.head_dim
    return 2 * values * decoder.embed_weight.element_size()


def pages_that_fit(
    decoder: Decoder, kv_memory: float | None, max_batch_size: int, max_model_len: int
) -> int:
    """Pages for the fullest batch, within ``kv_memory`` GiB; None is a quarter of the free memory.

    With math.inf there are as many as the batch needs. Raises ValueError when the device does not
    have that much, and when ``kv_memory`` does not hold a page.
    """
    wanted = max_batch_size * pages_for(max_model_len)
    if kv_memory == math.inf:
        needed, free = wanted * page_bytes(decoder), free_memory(decoder.embed_weight.device)
        if needed > free:
            raise ValueError(
                f"the KV cache of max_batch_size={max_batch_size} samples of {max_model_len} "
                f"tokens needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: "
                "lower max_batch_size, or set kv_memory (of a run: rollout.max_batch_size, "
                "rollout.kv_memory)"
            )
        return wanted
    if kv_memory is None:
        kv_memory = _SHARE_OF_FREE_MEMORY * free_memory(decoder.embed_weight.device) / 2**30
    pages = min(wanted, int(kv_memory * 2**30 // page_bytes(decoder)))
    if pages < 1:
        raise ValueError(
            f"kv_memory={kv_memory} GiB does not hold one page of "
            f"{page_bytes(decoder) / 2**20:.3f} MiB: raise it"
        )
    return pages


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what Linux can give without swapping, its file cache included
        values = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(values["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory(device: torch.device, of_modules: bool) -> None:
    """Gives what tensors have left behind back to the machine, so that others can have it.

    of_modules: tensors of a decoder are among them.
    """
    if of_modules:
        gc.collect()  # the modules refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks of up to 32 MB, most of the weights, for itself.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
