"""Lets vLLM's Model Runner V2 run on a CPU: Triton's interpreter stands in for a CPU back end.

Imported before vLLM, also by the processes that it starts.
"""

import os
from types import SimpleNamespace

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_CI_ENV="1",  # no warm-up
    VLLM_PLUGINS="softgrpo",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    TORCHDYNAMO_DISABLE="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_NO_USAGE_STATS="1",
)

import triton.backends

triton.backends.backends.setdefault(
    "cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
)
