"""Thinking that ends or changes its form by its entropy."""

import json

import pytest
import torch
from test_cuda_graphs import with_graphs

from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_engine.execution.entropy import entropy
from softgrpo_engine.scheduling.entropy_rules import ColdStop, EntropySwitch

THINK_END = 2
PARAMS = SamplingParams(n=3, max_tokens=20, seed=11, top_k=5, ignore_eos=True)
PURE = {"top_k": 8, "top_p": 1.0, "noise": "none", "tau": 1.0}
# Thresholds within what the tiny model has, so that each rule acts in the middle of samples.
COLD = SoftParams(**PURE | {"noise": "gumbel"}, cold_stop_entropy=4.0, cold_stop_steps=3)
SWITCH = SoftParams(**PURE, switch_window=2, max_switches=3)


def of(llm, prompts, soft, params=PARAMS):
    return [
        s for output in llm.generate(prompts, params, soft, progress=False) for s in output.samples
    ]


def test_a_cold_stop_counts_positions_in_a_row():
    rule = ColdStop(0.5, 3)
    assert [rule.read(h) for h in (0.1, 0.2, 0.5, 0.4, 0.3, 0.2, 0.1)] == [False] * 5 + [True] * 2
    rule = ColdStop(0.5, 3)
    assert (rule.may_act(2), rule.may_act(3)) == (False, True)
    rule.read(0.1)
    assert (rule.may_act(1), rule.may_act(2)) == (False, True)


def test_a_switch_goes_by_the_entropy_of_the_last_one():
    rule = EntropySwitch(window=2, max_switches=2)
    entropies = [2.0, 2.1, 1.9, 5.0, 1.8, 1.95, 1.96, 1.5]
    assert [(rule.read(h), rule.soft) for h in entropies] == [
        (False, True),  # 2.0 is what it falls from
        (False, True),
        (False, False),  # falls: discrete
        (False, False),  # rises, within the window
        (False, False),
        (False, True),  # rises above 1.9
        (False, True),
        (True, True),  # falls: one switch too many
    ]
    assert EntropySwitch(2, None).may_act(1)
    assert not ColdStop(0.1, 2).may_act(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropy_is_that_of_float64(dtype):
    torch.manual_seed(0)
    logits = (8 * torch.randn(5, 4001)).to(dtype)
    logits[1, 7] = 200  # cold
    logits[2] = 0  # uniform
    logits[3, 5:] = -torch.inf  # held back
    temperature = torch.tensor([1.0, 1.0, 0.5, 0.7, 2.0])[:, None]
    p = torch.softmax(logits.double() / temperature, -1)
    expected = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(
        entropy(logits, temperature).double(), expected, atol=1e-6, rtol=1e-5
    )
    assert expected[1] < 1e-12


@pytest.mark.parametrize("soft", [COLD, SWITCH])
@pytest.mark.parametrize("end_of_thinking", ["</think>", None])
def test_samples_do_not_depend_on_how_they_are_computed(make_llm, prompts, soft, end_of_thinking):
    """Overlapped steps, graphs, preemption and neighbours that ask for nothing."""
    soft = SoftParams(**soft.to_dict() | {"end_of_thinking": end_of_thinking})
    expected = of(make_llm(), prompts, soft)
    kinds = [s.soft.kind.tolist() for s in expected]
    assert any(0 in kind and 1 in kind for kind in kinds)
    forced = [s.soft.forced for s in expected]
    assert any(bool(f.any()) for f in forced) == (end_of_thinking is not None)
    graphs = with_graphs(make_llm(max_batch_size=9))
    graphs.overlap = True
    neighbours = graphs.submit(prompts, SamplingParams(max_tokens=9, seed=1), SoftParams())
    few_pages = make_llm(pages=9, max_batch_tokens=24, max_batch_size=7)
    for llm in (graphs, few_pages):
        for a, b in zip(of(llm, prompts, soft), expected, strict=True):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            assert a.soft.kind.tolist() == b.soft.kind.tolist()
            assert a.soft.forced.tolist() == b.soft.forced.tolist()
            torch.testing.assert_close(a.soft.gprime, b.soft.gprime, atol=2e-5, rtol=0)
    graphs.release(neighbours)
    assert few_pages.metrics()["preemptions"] > 0


def test_a_step_that_nobody_asks_computes_no_entropy(make_llm, prompts, monkeypatch):
    llm = with_graphs(make_llm())
    asked = []
    monkeypatch.setattr(
        "softgrpo_engine.execution.runner.entropy",
        lambda logits, temperature: asked.append(len(logits)) or logits.new_zeros(len(logits)),
    )
    of(llm, prompts, SoftParams(max_soft_tokens=4))
    of(llm, prompts, False)
    assert asked == []
    # Entropy 0 from the first position on: three, the forced end, and no more.
    samples = of(llm, prompts[:1], COLD)
    assert {tuple(s.soft.kind.tolist()) for s in samples} == {(1,) * 3 + (0,) * 17}
    assert {s.token_ids[3] for s in samples} == {THINK_END}
    before = len(asked)
    of(llm, prompts[:1], False)
    assert before == len(asked) > 0


def test_what_a_rule_needs():
    for settings, says in (
        ({"cold_stop_entropy": 0.0}, "cold_stop_entropy=0.0"),
        ({"cold_stop_steps": 0}, "cold_stop_steps=0"),
        ({"switch_window": 0}, "switch_window=0"),
        ({"max_switches": 3}, "max_switches=3 needs switch_window"),
        ({"cold_stop_entropy": 0.1, "switch_window": 512}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=says):
            SoftParams(**settings)
    assert SoftParams.from_dict(json.loads(json.dumps(SWITCH.to_dict()))) == SWITCH
