"""Mixtures from the table of a model, or from whatever else its embedding computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softgrpo_kernels import soft_embedding


class Launches(TorchDispatchMode):
    """The ops that ran, but those that only look at memory in another way."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.names.append(op.name())
        return op(*args, **kwargs or {})


def runner_of(vllm):
    executor = vllm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner


@pytest.fixture
def embedding(vllm):
    """Of vLLM's model, as if its weights had just come."""
    from softgrpo_vllm.embedding import InputEmbedding

    known = runner_of(vllm).model_state.embedding
    return InputEmbedding(known.model, known.vocabulary, known.device)


@pytest.fixture
def mixed():
    """ids with unused slots, and weights."""
    torch.manual_seed(0)
    ids = torch.randint(0, 97, (7, 5), dtype=torch.int32)
    ids[::2, 3:] = -1
    return ids, torch.rand(7, 5)


def test_a_step_mixes_rows_of_the_table_in_one_launch(embedding, mixed):
    first = embedding.mixtures(*mixed)  # looks what the embedding is
    with Launches() as launches:
        found = embedding.mixtures(*mixed)
    assert launches.names == ["softgrpo_kernels::soft_embedding"]
    embedding._table = None
    for mixtures in (first, found):
        assert torch.equal(mixtures, embedding.mixtures(*mixed))


def test_an_embedding_that_does_more_is_asked(embedding, mixed, monkeypatch):
    """Also where it does so for one token alone, and after an update."""
    model = embedding.model
    embedding.mixtures(*mixed)
    table, embed = embedding._table.weight, model.embed_input_ids
    other = table.clone()
    other[96] *= 2
    monkeypatch.setattr(model, "embed_input_ids", lambda ids: torch.where(
        (ids == 96)[:, None], 2 * embed(ids), embed(ids)))  # fmt: skip
    monkeypatch.setattr(model, "weight_updates", model.weight_updates + 1)
    mixed[0][0, 0] = 96
    assert torch.equal(embedding.mixtures(*mixed), soft_embedding(*mixed, other))
    assert embedding._table is None


@pytest.mark.parametrize("name", ["tp_size", "weight"])
def test_a_part_of_a_table_is_none(name, embedding, mixed, monkeypatch):
    """Of a table on two ranks, or one that is packed."""
    embedding.mixtures(*mixed)
    table = embedding._table
    if name == "tp_size":
        monkeypatch.setattr(table, "tp_size", 2)
    else:
        monkeypatch.delitem(table._parameters, "weight")
    assert not embedding._is_plain(table)
