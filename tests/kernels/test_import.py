"""What an import costs, and what happens without the compiled extension."""

import json
import os
import subprocess
import sys

import pytest
import torch

from softgrpo_kernels import soft_token
from softgrpo_kernels.extension import cpu_extension

SAMPLE = """
import json, torch
from softgrpo_kernels import gumbel_noise, soft_embedding, soft_token
logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(1))
out = soft_token(logits, top_k=5, top_p=0.9, mode=torch.tensor([0, 1, 2, 2, 1, 2]), seed=7)
whole = soft_token(logits, mode=1, top_p=torch.tensor([1.0, 0.9] * 3))
soft_embedding(out.ids, out.weights, torch.randn(500, 8))
gumbel_noise(out.ids, 1, 2, 3)
print(json.dumps([out.ids.tolist(), out.kind.tolist(), whole.token.tolist()]))
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_needs_only_torch():
    code = (
        "import sys, softgrpo_kernels\n"
        "print([m for m in ('transformers', 'softgrpo_engine', 'softgrpo', 'scipy', 'kernels')"
        " if m in sys.modules])"
    )
    assert run(code).stdout.strip() == "[]"


def test_without_the_extension_it_says_so_once_and_gives_the_same():
    without = run(SAMPLE, SOFTGRPO_NO_EXT="1")
    assert without.stderr.count("no C++ CPU kernels") == 1
    assert "SOFTGRPO_NO_EXT" in without.stderr
    with_extension = run(SAMPLE, SOFTGRPO_NO_EXT="0")
    assert json.loads(without.stdout) == json.loads(with_extension.stdout)
    if cpu_extension() is not None:
        assert "no C++ CPU kernels" not in with_extension.stderr


def test_the_cpu_back_end_is_an_error_where_it_cannot_run():
    with pytest.raises(ValueError, match="backend 'cpu'"):
        soft_token(torch.randn(1, 8, dtype=torch.double), top_k=2, backend="cpu")
    with pytest.raises(ValueError, match="backend must be"):
        soft_token(torch.randn(1, 8), top_k=2, backend="gpu")
