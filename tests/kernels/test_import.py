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


# What `pip install torch` and `pip install --no-deps softgrpo` put there, and nothing else.
ONLY_TORCH = """
import sys
ALLOWED = {
    "torch", "torchgen", "functorch",
    "filelock", "fsspec", "jinja2", "markupsafe", "networkx", "setuptools",
    "sympy", "mpmath", "typing_extensions", "softgrpo_kernels",
    *sys.stdlib_module_names,
}
class OnlyAllowed:
    def find_spec(self, name, path=None, target=None):
        if path is None and name not in ALLOWED and not name.startswith("_"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, OnlyAllowed())
"""

TRAINING = """
import torch
from softgrpo_kernels import linear_soft_logprob, soft_token
hidden, head = (torch.randn(*s, requires_grad=True) for s in ((6, 8), (500, 8)))
kind = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.uint8)
drawn = soft_token((hidden @ head.T).detach(), top_k=5)
linear_soft_logprob(
    hidden, head, drawn.ids, drawn.gprime, drawn.n, kind, drawn.token
).sum().backward()
assert head.grad.abs().sum() > 0
"""


def test_torch_is_all_it_needs():
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run(ONLY_TORCH + SAMPLE + TRAINING + "import transformers")
    assert len(json.loads(refused.value.stdout)) == 3
    assert refused.value.stderr.strip().endswith("transformers is not installed")


def test_the_import_is_quick_and_imports_no_compiler():
    code = (
        "import sys, time, torch; begin = time.process_time()\n"
        "import softgrpo_kernels; seconds = time.process_time() - begin\n"
        "heavy = {'triton', 'torch._dynamo', 'torch._inductor', 'transformers', 'scipy'}\n"
        "print(seconds, *heavy & set(sys.modules))"
    )
    seconds, *heavy = run(code).stdout.split()
    assert not heavy
    assert float(seconds) < 0.3


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
