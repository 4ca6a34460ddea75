"""What the logits of a step are the product of: candidates are computed again from it, in fp32."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn


class Processor(nn.Module):
    """As vLLM's: a product, of which it cuts what pads the vocabulary."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.soft_cap = scale, None

    def forward(self, head, hidden, bias=None):
        return nn.functional.linear(hidden, head.weight, bias)[:, :7] * self.scale


class Plain(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.lm_head = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(4)
        self.logits_processor = Processor()

    def compute_logits(self, hidden):
        return self.logits_processor(self.lm_head, hidden)


class Biased(Plain):  # GPT-J
    def compute_logits(self, hidden):
        return self.logits_processor(self.lm_head, hidden, self.lm_head.bias)


class Normed(Plain):  # MiMo, Step 3.5
    def compute_logits(self, hidden):
        return self.logits_processor(self.lm_head, 2 * self.norm(hidden))


class Multiplied(Plain):
    def compute_logits(self, hidden):
        return 3 * super().compute_logits(hidden)


class Scaled(Plain):  # Granite, Cohere
    def __init__(self, **options):
        super().__init__(**options)
        self.logits_processor = Processor(scale=0.25)


@pytest.fixture
def product_of():
    """product_of(base): the logits of a model, and what they are known to be the product of."""
    from softgrpo_vllm.models import _with_soft_state

    def of(base):
        config = SimpleNamespace(additional_config={"softgrpo": True})
        model = _with_soft_state("SoftModel", base)(vllm_config=config)
        return model.compute_logits(torch.randn(3, 4)), model.head_product

    return of


@pytest.mark.parametrize("base", [Plain, Biased, Normed])
def test_a_product_is_known_as_the_head_was_given_it(base, product_of):
    logits, product = product_of(base)
    again = nn.functional.linear(product.hidden, product.head.weight, product.bias)
    torch.testing.assert_close(again[:, :7], logits, rtol=0, atol=0)


@pytest.mark.parametrize("base", [Multiplied, Scaled])
def test_what_is_more_than_a_product_is_taken_as_it_is(base, product_of):
    assert product_of(base)[1] is None
