"""The code of docs/kernels.md, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

CODE = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(),
    flags=re.DOTALL,
)
NEVER = 10**6  # no token


@pytest.fixture(scope="module")
def docs():
    """What the blocks define; each is complete with its imports."""
    names = {}
    for block in CODE:
        own = {}
        exec(block, own)
        names |= own
    return names


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def prompts():
    """Two of different lengths, padded on the left."""
    ids, mask = torch.randint(300, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def tokens(steps):
    return torch.stack([step.token for step in steps], dim=1)


def test_a_row_draws_the_same_beside_another_one_and_until_its_end(docs, model, prompts):
    free = tokens(docs["generate"](model, *prompts, end_id=NEVER, max_new_tokens=16))
    assert free.shape == (2, 16)
    # uid 0: the first row alone is itself; the other one is a sample of its own.
    alone = docs["generate"](model, prompts[0][:1], prompts[1][:1], end_id=NEVER, max_new_tokens=16)
    assert torch.equal(tokens(alone)[0], free[0])

    end = int(free[0, 4])
    first = free.eq(end).int().argmax(1).where(free.eq(end).any(1), 16)
    steps = docs["generate"](model, *prompts, end_id=end, max_new_tokens=16)
    ended = tokens(steps)
    for row, place in enumerate(first.tolist()):
        assert torch.equal(ended[row, : place + 1], free[row, : place + 1])
        assert (ended[row, place + 1 :] == -1).all()
    assert steps[int(first[0])].kind[0] == 0


def test_the_record_rebuilds_inputs_and_log_probabilities(docs, model, prompts):
    steps = docs["generate"](model, *prompts, end_id=NEVER, max_new_tokens=3)
    table = model.get_input_embeddings().weight.detach()
    step, position = steps[2], prompts[1].sum(-1) + 2
    inputs, logp = docs["rebuild"](step, table, seed=0, uid=torch.arange(2), position=position)
    assert torch.equal(inputs, step.embed)
    live = step.ids >= 0
    torch.testing.assert_close(logp[live], step.logp[live], rtol=0, atol=4e-6)


def test_a_training_step_scores_what_was_drawn_and_moves_the_weights(docs, model, prompts):
    free = tokens(docs["generate"](model, *prompts, end_id=NEVER, max_new_tokens=8))
    steps = docs["generate"](model, *prompts, end_id=int(free[0, 3]), max_new_tokens=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logp = docs["train_step"](model, optimizer, *prompts, steps, torch.tensor([1.0, -1.0]))
    assert len(logp) == int((tokens(steps) >= 0).sum())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    # On policy: u = g' - log q is the noise that was drawn. The first position of the first row:
    first = steps[0]
    n = int(first.n[0])
    u = (first.gprime - first.logp)[0, :n]
    torch.testing.assert_close(logp[0], (-u - torch.exp(-u)).sum(), rtol=1e-4, atol=1e-4)
