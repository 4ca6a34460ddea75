"""The code of docs/kernels.md, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import softgrpo_kernels

CODE = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(),
    flags=re.DOTALL,
)


@pytest.fixture
def names():
    """What the reader has: a model, a prompt, the imports."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    ops = {name: getattr(softgrpo_kernels, name) for name in softgrpo_kernels.__all__}
    model = transformers.LlamaForCausalLM(config).eval()
    return {"torch": torch, "model": model, "prompt": torch.randint(300, (2, 7)), **ops}


def test_the_generate_loop_is_reproducible_and_its_record_rebuilds_the_inputs(names):
    loop, rebuild, density = CODE
    exec(loop, names)
    text, step = names["text"], names["step"]
    assert text.shape == (2, 16)
    exec(loop, names)
    assert torch.equal(names["text"], text)
    exec(rebuild, names)
    assert torch.equal(names["weights"], step.weights)
    assert torch.equal(names["inputs"], step.embed)
    live = step.ids >= 0
    torch.testing.assert_close(names["logp"][live], step.logp[live], rtol=0, atol=4e-6)

    head = names["model"].lm_head.weight
    names["hidden"] = torch.randn(2, 32, requires_grad=True)
    exec(density, names)
    names["density"].sum().backward()
    used = torch.zeros(300, dtype=torch.bool)
    used[step.ids[live].long()] = True
    assert head.grad[used].abs().sum() > 0
    assert not head.grad[~used].any()
