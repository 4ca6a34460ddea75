"""Padded decode steps from recorded graphs, bit for bit: on the CPU, where a stand-in records them
and products do not depend on the batch."""

import copy

import pytest
import torch

from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_engine.execution.cuda_graphs import DecodeGraphs, bucket
from softgrpo_engine.execution.decode_inputs import DecodeInputs, DecodeShape, DecodeTables
from softgrpo_engine.execution.runner import Runner
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.weights import empty_decoder
from softgrpo_engine.ops.extension import cpu_extension


@pytest.fixture
def device():
    return torch.device("cpu")


EOS = 1
PARAMS = SamplingParams(n=3, max_tokens=20, min_tokens=4, seed=4, top_k=6)
SOFT = SoftParams(top_k=4, tau=0.7, end_of_thinking=2, max_soft_tokens=9)


class Replayed:
    """What a graph does: the step again, on the same tensors. Recording runs it as a warm-up."""

    recorded = 0

    def __init__(self, step):
        self._step, self.drawn = step, step()
        Replayed.recorded += 1

    @torch.inference_mode()
    def replay(self):
        # A GPU has copied the old result, in its own order, before this one comes.
        self.drawn = self._step()


def with_graphs(llm):
    Replayed.recorded = 0
    runner = llm.runner
    runner.graphs = DecodeGraphs(
        lambda inputs: runner._decode(inputs), runner._addresses, runner.device, Replayed
    )
    return llm


def samples_of(llm, prompts, params=PARAMS, soft=SOFT):
    outputs = llm.generate_groups(
        prompts,
        params,
        soft,
        seed=3,
        uids=[[10 * i + j for j in range(3)] for i in range(len(prompts))],
    )
    return [sample for output in outputs for sample in output.samples]


def assert_same(samples, expected):
    for a, b in zip(samples, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert a.finish_reason == b.finish_reason
        assert torch.equal(a.soft.ids, b.soft.ids)
        assert torch.equal(a.soft.gprime, b.soft.gprime)
        assert torch.equal(a.logprobs, b.logprobs)


def test_shapes_come_in_few_sizes():
    rows = [bucket(DecodeShape(n, 1, 0), 100).rows for n in range(1, 101)]
    assert rows[:17] == [1, 2, 4, 4, 8, 8, 8, 8, *[16] * 8, 32]
    assert rows[95] == 96
    assert rows[96:] == [100] * 4
    assert all(size - n < 16 for n, size in enumerate(rows, 1))  # a padding slot for each
    assert [bucket(DecodeShape(1, n, 0), 8).pages for n in (1, 32, 33, 65)] == [32, 32, 64, 128]
    assert [bucket(DecodeShape(1, 1, n), 8).ends for n in (0, 1, 3)] == [0, 1, 4]
    assert [bucket(DecodeShape(1, 1, 0, n), 8).entropies for n in (0, 1)] == [0, 1]
    assert [bucket(DecodeShape(1, 1, 0, 0, n), 8).noises for n in (0, 1)] == [0, 1]
    assert [bucket(DecodeShape(1, 1, 0, unlisted=u), 8).unlisted for u in (False, True)] == [
        False,
        True,
    ]


def test_inputs_are_views_of_one_block():
    shape = DecodeShape(rows=3, pages=5, ends=2, entropies=1, noises=1)
    words = torch.arange(shape.words, dtype=torch.int32)
    inputs = DecodeInputs.views(words, shape)
    parts = inputs.tensors.values()
    assert sum(part.nbytes for part in parts) == words.nbytes
    for part in parts:
        part.fill_(-7)
    assert (words != torch.arange(shape.words)).all()  # no word is in none of them
    assert inputs.held_back.shape == (3, 2)
    assert inputs.block_table.shape == (3, 5)
    assert inputs.temperature.shape == (3, 1)
    assert inputs.deviation.shape == (3, 1)


@pytest.mark.skipif(cpu_extension() is None, reason="only the C++ products have rows of their own")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pages", [None, 11])
def test_padded_steps_have_the_bits_of_plain_ones(make_llm, prompts, pages, overlap):
    """Phases, ends, held-back ends, groups; with few pages also preemption."""
    options = {"batch_invariant": True, "max_batch_size": 11, "pages": pages}
    llm = with_graphs(make_llm(**options))
    llm.overlap = overlap
    samples = samples_of(llm, prompts)
    assert_same(samples, samples_of(make_llm(**options), prompts))
    assert {sample.finish_reason for sample in samples} >= {"length"}
    assert any(0 < int(sample.soft.kind.sum()) < len(sample.token_ids) for sample in samples)
    assert len(llm.runner.graphs) > 1
    assert llm.metrics()["running"] == 0


def test_padding_touches_nothing_of_a_sequence(make_llm, prompts):
    llm = make_llm()
    call = llm.submit(prompts, SamplingParams(max_tokens=8, ignore_eos=True), SOFT)
    for _ in range(3):
        llm.step()
    runner, shape = llm.runner, DecodeShape(rows=16, pages=4, ends=1)
    live = [runner.k_pages[:, :-1], runner.v_pages[:, :-1]]
    live += [x[:-1] for x in runner.record.tensors if x.shape[0] == runner.record.rows]
    before = [x.clone() for x in live]
    empty = DecodeTables(*[torch.empty(0, 0).numpy()] * 4)
    with torch.inference_mode():
        words = runner._decode_words(shape, [], empty)
        drawn = runner._decode(DecodeInputs.views(words, shape))
    assert drawn[2].all()  # valid: nobody is told of bad logits
    for a, b in zip(live, before, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    llm.release(call)


def test_held_back_tokens_alone_lose_their_logits(make_llm, monkeypatch):
    """Token 0 in one row; in the other the padding, which no token stands for, leaves it alone."""
    seen = []

    def draw(record, rows, index, logits, *args, **kwargs):
        seen.append(logits.clone())
        raise InterruptedError

    monkeypatch.setattr("softgrpo_engine.execution.record.draw_into_record", draw)
    runner, places = make_llm().runner, torch.zeros(2, dtype=torch.int64)
    hidden = torch.randn(2, runner.decoder.config.hidden_size)
    for held_back in (torch.empty(2, 0), torch.tensor([[0, 5, 9], [7, -1, -1]])):
        with torch.inference_mode(), pytest.raises(InterruptedError):
            runner._draw(hidden, places, places, held_back.long(), torch.empty(2, 0), True)
    plain, held = (x.tolist() for x in seen)
    plain[0][0] = plain[0][5] = plain[0][9] = plain[1][7] = -torch.inf
    assert held == plain


def test_graphs_are_kept_until_a_tensor_moves(make_llm, prompts, hf_model, monkeypatch):
    # As on a GPU, which computes with the weights where they stand.
    monkeypatch.setattr("softgrpo_engine.model.projections.is_fastest", lambda dtype: False)
    llm = with_graphs(make_llm())
    samples_of(llm, prompts[:2])
    recorded = Replayed.recorded
    assert recorded
    state = copy.deepcopy(hf_model.state_dict())
    for tensor in state.values():
        tensor.mul_(1.01)
    llm.update_weights(state.items(), 1)
    updated = samples_of(llm, prompts[:2])
    assert Replayed.recorded == recorded  # the weights were replaced in place
    fresh = make_llm()
    fresh.update_weights(state.items(), 1)
    for a, b in zip(updated, samples_of(fresh, prompts[:2]), strict=True):
        assert a.token_ids == b.token_ids

    recorded = Replayed.recorded
    llm.sleep(weights=False)
    assert len(llm.runner.graphs) > 0
    llm.wake()
    runner = llm.runner
    moved = runner.graphs._recorded_with != runner._addresses()
    for a, b in zip(samples_of(llm, prompts[:2]), updated, strict=True):
        assert a.token_ids == b.token_ids
    assert (Replayed.recorded > recorded) == moved
    recorded = Replayed.recorded

    longer = SamplingParams(max_tokens=50, ignore_eos=True, min_tokens=4)
    samples_of(llm, prompts[:2], longer)  # the record grows
    assert Replayed.recorded > recorded
    llm.sleep()
    assert len(llm.runner.graphs) == 0
    llm.wake()
    llm.update_weights(state.items(), 2)
    for a, b in zip(samples_of(llm, prompts[:2]), updated, strict=True):
        assert a.token_ids == b.token_ids


def test_a_decode_step_reads_nothing_back(hf_model, monkeypatch):
    """On the device "meta", where no value can be read."""
    with pytest.raises(RuntimeError):
        torch.ones(1, device="meta").item()
    decoder = empty_decoder(DecoderConfig.from_hf(hf_model.config), torch.float32, "meta")
    decoder.pack()
    runner = Runner(decoder, num_pages=8, rows=4)
    runner.record.reserve(10, 4)
    monkeypatch.setattr(
        "softgrpo_engine.model.attention.paged_attention",
        lambda q, *args, **kwargs: torch.empty_like(q),
    )
    for entropies, noises in ((0, 0), (1, 0), (0, 1)):
        shape = DecodeShape(4, pages=2, ends=2, entropies=entropies, noises=noises)
        words = torch.empty(shape.words, dtype=torch.int32, device="meta")
        with torch.inference_mode():
            drawn = runner._decode(DecodeInputs.views(words, shape))
        assert drawn.shape == (3 + entropies, 4)
        assert drawn.is_meta
