"""The oracle on transformers gives the rollouts of the native engine."""

import pytest
import torch

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.hf_engine import HFEngine

PROMPTS = [[5, 6, 7, 8], [9] * 17, [30]]
UIDS = [[4, 2**32 - 1, 77], [0, 1, 2], [3, 5, 8]]
THINKING = {"end_of_thinking": 40}
# Soft to the end; an answer after it; budgets with and without a token that ends the phase; the
# noise of `official`; other noises; discrete from candidates, from the vocabulary, greedy.
FORCED = (
    "budget",
    "exact-budget",
    "embedding-budget",
    "cold-stop",
    "cold-stop-least",
    "switches-spent",
)
COLD = {"cold_stop_entropy": 4.0, "cold_stop_steps": 2}
SWITCH = {"top_k": 5, "top_p": 1.0, "noise": "none", "tau": 1.0}
CASES = {
    "soft": (SoftParams(top_k=5), {}),
    "wide": (SoftParams(top_k=20, top_p=1.0, tau=1.0, temperature=0.7), {}),
    "answer": (SoftParams(top_k=5, top_p=0.99, **THINKING), {"temperature": 1.4}),
    "budget": (SoftParams(top_k=5, max_soft_tokens=3, **THINKING), {}),
    "budget-no-end": (SoftParams(top_k=5, max_soft_tokens=3, end_of_thinking=None), {}),
    # Every other token ends thinking, or the sample.
    "exact-budget": (
        SoftParams(top_k=5, min_soft_tokens=3, max_soft_tokens=3, **THINKING),
        {"stop_token_ids": tuple(range(1, 97, 2))},
    ),
    # Rules of entropies, at one of the tiny model: 3.4 to 4.5 nats.
    "cold-stop": (SoftParams(top_k=5, **COLD, **THINKING), {}),
    "cold-stop-no-end": (SoftParams(top_k=5, **COLD, end_of_thinking=None), {}),
    "cold-stop-least": (SoftParams(top_k=5, **COLD, min_soft_tokens=7, **THINKING), {}),
    "switch": (SoftParams(**SWITCH, switch_window=1, **THINKING), {}),
    "switch-window": (SoftParams(**SWITCH, switch_window=3, end_of_thinking=None), {}),
    "switches-spent": (SoftParams(**SWITCH, switch_window=1, max_switches=2, **THINKING), {}),
    "official": (SoftParams(top_k=5, noise_clip=(-1.5, 3.0), eps=1e-6), {}),
    "floor": (SoftParams(top_k=5, tau=1.0, weight_floor=0.3), {}),
    "dirichlet": (SoftParams(top_k=5, noise="dirichlet", tau=1.0, noise_scale=5.0), {}),
    "embedding": (SoftParams(top_k=5, noise="embedding", tau=1.0), {}),
    # Tokens after thinking are fed without noise.
    "embedding-budget": (
        SoftParams(top_k=5, noise="embedding", max_soft_tokens=4, **THINKING),
        {},
    ),
    "candidates": (False, {"top_k": 6}),
    "vocabulary": (False, {"top_k": -1, "top_p": 0.9}),
    "greedy": (False, {"temperature": 0.0}),
}


@pytest.fixture(scope="module")
def path(hf_model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("oracle")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def pair(path, tokenizer, device):
    options = {"tokenizer": tokenizer, "dtype": "float32", "kv_memory": 0.01, "max_batch_size": 16}
    return LLM(path, **options), HFEngine(path, max_model_len=128, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_draws_what_the_native_engine_draws(case, pair):
    soft, changes = CASES[case]
    changes = {"temperature": 0.9, "top_k": 6, **changes}
    params = SamplingParams(max_tokens=12, kept_mass=True, **changes)
    ours, theirs = (
        engine.generate_groups(PROMPTS, params, soft, seed=2**63 + 5, uids=UIDS, stream=1)
        for engine in pair
    )
    a, b = ([s for output in side for s in output.samples] for side in (ours, theirs))
    assert [s.token_ids for s in a] == [s.token_ids for s in b]
    for x, y in zip(a, b, strict=True):
        assert (x.finish_reason, x.uid, x.text) == (y.finish_reason, y.uid, y.text)
        assert x.soft.ids.tolist() == y.soft.ids.tolist()
        for name in ("kind", "forced", "token"):
            assert getattr(x.soft, name).tolist() == getattr(y.soft, name).tolist()
        torch.testing.assert_close(x.soft.gprime, y.soft.gprime, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(x.kept_mass, y.kept_mass, atol=1e-5, rtol=1e-4, equal_nan=True)
        assert x.kept_mass.isnan().tolist() == x.soft.kind.bool().tolist()
    kinds = torch.cat([s.soft.kind for s in a])
    assert bool(kinds.any()) == bool(soft)
    if "budget" in case or case == "answer":
        assert not bool(kinds.all())
    assert bool(torch.cat([s.soft.forced for s in a]).any()) == (case in FORCED)
    rises = [bool((s.soft.kind.diff().view(torch.int8) > 0).any()) for s in a]  # soft again
    assert any(rises) == (case in ("switch", "switch-window", "switches-spent"))
    assert len({tuple(s.token_ids) for s in a}) == (3 if case == "greedy" else 9)


@pytest.mark.parametrize("asleep", [False, True])
def test_the_oracle_takes_new_weights(hf_model, pair, asleep):
    native, oracle = pair
    torch.manual_seed(1)
    state = hf_model.state_dict()
    changed = {n: p + 0.05 * torch.randn_like(p) for n, p in state.items() if n != "lm_head.weight"}
    options = {"seed": 0, "uids": UIDS}
    params, soft = SamplingParams(max_tokens=8), SoftParams()
    before = oracle.generate_groups(PROMPTS, params, soft, **options)
    for engine in pair:
        if asleep:
            engine.sleep(weights=True)
            with pytest.raises(RuntimeError, match=r"wake\(\)|since it slept: call update_weights"):
                engine.generate_groups(PROMPTS, params, soft, **options)
        engine.update_weights(iter(changed.items()), version=7)
        if asleep:
            engine.wake()
    ours, theirs = (engine.generate_groups(PROMPTS, params, soft, **options) for engine in pair)
    tokens = [[[s.token_ids for s in o.samples] for o in side] for side in (ours, theirs, before)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert native.weight_version == oracle.weight_version == 7
    with pytest.raises(ValueError, match=r"without 'model\.norm\.weight'"):
        oracle.update_weights((x for x in changed.items() if x[0] != "model.norm.weight"), 8)


def test_a_prompt_that_does_not_fit_the_oracle(pair):
    with pytest.raises(ValueError, match="prompt 1 has 120 tokens"):
        pair[1].check_fits([[5], [6] * 120], SamplingParams(max_tokens=12))
