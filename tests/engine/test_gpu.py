"""The engine on a GPU, simulated or real: graphs, overlap, threads, and what the host waits for."""

import copy
import threading

import pytest
import torch
from families import FAMILIES, make_pair

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
FREE = SamplingParams(max_tokens=12, ignore_eos=True, seed=7)
# Mixtures feed roundings back: two of them, then tokens.
FEW_SOFT = SoftParams(top_k=4, tau=0.7, end_of_thinking=None, max_soft_tokens=2)
SOFT = SoftParams(top_k=4, tau=0.7, end_of_thinking="</think>", max_soft_tokens=9)


@pytest.fixture
def make_gpu_llm(make_llm_on, gpu):
    def make(*arguments, **options):
        return make_llm_on(gpu, *arguments, **options)

    return make


def sampled(llm, prompts, **changes):
    params = SamplingParams(**{"n": 3, "max_tokens": 24, "min_tokens": 5, "seed": 4} | changes)
    outputs = llm.generate(prompts, params, SOFT, progress=False)
    return [sample for output in outputs for sample in output.samples]


def assert_close(samples, expected, tolerance=1e-4):
    for a, b in zip(samples, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert torch.equal(a.soft.ids, b.soft.ids)
        assert torch.equal(a.soft.kind, b.soft.kind)
        assert torch.equal(a.soft.forced, b.soft.forced)
        torch.testing.assert_close(a.soft.gprime, b.soft.gprime, rtol=0, atol=tolerance)
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=tolerance)


def test_the_cpu_draws_the_same(make_gpu_llm, make_llm_on, prompts):
    assert_close(sampled(make_gpu_llm(), prompts), sampled(make_llm_on("cpu"), prompts))


def test_the_kernels_themselves_draw_the_same(make_llm_on, simulated_gpu, prompts, monkeypatch):
    """Under Triton's interpreter, in whose place stand-ins run elsewhere: a prompt, soft tokens,
    tokens over the vocabulary."""
    monkeypatch.setenv("SOFTGRPO_KERNELS", "interpreter")
    few = SamplingParams(n=2, max_tokens=4, seed=4, top_p=0.9, ignore_eos=True)
    drawn = []
    for device in ("cuda", "cpu"):
        outputs = make_llm_on(device).generate(prompts[:1], few, FEW_SOFT, progress=False)
        drawn.append([sample for output in outputs for sample in output.samples])
    assert_close(*drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_what_the_cpu_draws(family, gpu, prompts):
    drawn = []
    for device in (gpu, "cpu"):
        _, decoder = make_pair(family)
        llm = LLM(decoder.to(device), max_batch_size=16, max_model_len=128)
        outputs = llm.generate(prompts, FREE, FEW_SOFT, progress=False)
        drawn.append([sample for output in outputs for sample in output.samples])
    assert_close(*drawn)


def test_graphs_give_what_eager_steps_give(make_gpu_llm, prompts):
    eager, graphed = make_gpu_llm(), make_gpu_llm()
    eager.runner.graphs = None
    assert_close(sampled(graphed, prompts), sampled(eager, prompts))
    assert len(graphed.runner.graphs) > 1
    recorded = len(graphed.runner.graphs)
    sampled(graphed, prompts)
    assert len(graphed.runner.graphs) == recorded


def test_a_larger_record_is_captured_anew(make_gpu_llm, make_llm_on, prompts):
    """Also while a result of the old graphs is held: their pool is then dead, and captured into no
    more (PyTorch asserts that its use_count is not 0)."""
    llm = make_gpu_llm()
    sampled(llm, prompts[:2])
    held = [recorded.drawn for _, recorded in llm.runner.graphs._graphs.values()]
    longer = {"max_tokens": 60}
    expected = sampled(make_llm_on("cpu"), prompts[:2], **longer)
    assert_close(sampled(llm, prompts[:2], **longer), expected)
    assert held[0].shape[0] == 3


def test_graphs_see_updated_weights(make_gpu_llm, hf_model, prompts):
    state = {name: 1.05 * x for name, x in hf_model.state_dict().items()}
    updated, fresh = make_gpu_llm(), make_gpu_llm()
    sampled(updated, prompts)
    recorded = dict(updated.runner.graphs._graphs)
    updated.update_weights(state.items(), 1)
    fresh.update_weights(state.items(), 1)
    assert_close(sampled(updated, prompts), sampled(fresh, prompts))
    # In place: what was recorded is still in use.
    assert recorded.items() <= updated.runner.graphs._graphs.items()


def test_preemption_changes_nothing(make_gpu_llm, prompts):
    tight = make_gpu_llm(pages=9)
    assert_close(sampled(tight, prompts), sampled(make_gpu_llm(), prompts))
    assert tight.metrics()["preemptions"] > 0


def test_other_threads_may_use_the_device_while_a_graph_is_captured(make_gpu_llm, prompts):
    """As AsyncLLM's callers do: in the global mode their waits would break the capture."""
    llm = make_gpu_llm()
    step, failures = llm.runner._decode, []

    def elsewhere():
        try:
            torch.ones(2, device="cuda").sum().item()
        except RuntimeError as error:
            failures.append(error)

    def disturbed(*arguments):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return step(*arguments)

    llm.runner.graphs._step = disturbed
    assert len(sampled(llm, prompts[:2])) == 6
    assert failures == []


def test_a_decode_step_waits_for_nothing(make_gpu_llm, prompts):
    """From planned to launched: PyTorch raises where something would synchronise."""
    llm = make_gpu_llm()
    call = llm.submit(prompts, FREE, soft=SOFT)
    for _ in range(4):
        llm.step()
    plan = llm.scheduler.schedule()
    assert plan.is_decode
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = llm.runner.run(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(launched.read().valid)
    llm.scheduler.commit(plan)
    llm.release(call)


def step_counts(llm, simulated_gpu):
    """Waits and launches of every step until all is done."""
    counts = []
    while llm.scheduler.has_work:
        with simulated_gpu.counting() as step:
            llm.step()
        counts.append(step)
    return counts


@pytest.mark.parametrize(
    "soft",
    [
        False,
        SOFT,
        SoftParams(noise="dirichlet", tau=1.0),
        SoftParams(noise="embedding", tau=1.0, max_soft_tokens=9),
    ],
)
def test_waits_of_a_step(make_llm_on, simulated_gpu, prompts, soft):
    """One for the tokens, and one more where samples end, whatever their number."""
    llm = make_llm_on("cuda")
    llm.generate(prompts, FREE, soft, progress=False)  # captures
    call = llm.submit(prompts, FREE, soft)
    assert len(call.sequences) == 6
    steps = step_counts(llm, simulated_gpu)
    ends = [step for step in steps if step.waits.total() == 2]
    assert all(step.waits.total() <= 1 for step in steps if step not in ends), steps[0].table()
    # All end by their length: in one step; one is read where the budget may force a token.
    assert len(ends) <= 1 + (soft is SOFT)
    llm.release(call)


def test_an_update_of_the_weights_waits_for_nothing(make_llm_on, simulated_gpu, hf_model, prompts):
    llm = make_llm_on("cuda")
    state = {name: x.to("cuda") for name, x in hf_model.state_dict().items()}
    llm.generate(prompts, FREE, SOFT, progress=False)
    with simulated_gpu.counting() as counts:
        llm.update_weights(state.items(), 1)
    assert counts.waits.total() == 0, counts.table()


def test_launches_of_a_decode_step(make_llm_on, simulated_gpu, prompts):
    """What a step that is replayed launches from the host, and what its graph holds. The bounds are
    what it takes today: who changes them knows why."""
    llm = make_llm_on("cuda")
    llm.generate(prompts, FREE, SOFT, progress=False)
    call = llm.submit(prompts, FREE, SOFT)
    llm.step()
    llm.step()
    with simulated_gpu.counting() as counts:
        llm.step()
    assert counts.launches["graph"] == 1
    assert counts.launches.total() <= LAUNCHES_FROM_THE_HOST, counts.launches
    graphs = llm.runner.graphs._graphs.values()
    layers = llm.config.num_layers
    for _, recorded in graphs:
        assert len(recorded._graph) <= LAUNCHES_IN_A_GRAPH + layers * LAUNCHES_IN_A_LAYER
    llm.release(call)


# The words of the inputs, the graph, the copy of the tokens.
LAUNCHES_FROM_THE_HOST = 3
LAUNCHES_IN_A_LAYER = 10
LAUNCHES_IN_A_GRAPH = 12


@pytest.mark.parametrize("attention", ["flashinfer", "varlen"])
def test_other_back_ends_draw_the_same(hf_model, prompts, attention, gpu):
    if attention == "flashinfer":
        pytest.importorskip("flashinfer")
    elif torch.nn.attention.current_flash_attention_impl() != "FA3":
        pytest.skip("FlashAttention 3 is not active")
    config = copy.deepcopy(hf_model.config)
    config.head_dim = 64  # theirs takes no 8
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.from_hf(config)).to("cuda", torch.bfloat16)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.14)
    first = []
    for name in ("kernels", attention):
        llm = LLM(decoder, attention=name, max_model_len=256, max_batch_size=16)
        outputs = llm.generate(prompts, GREEDY, soft=False, progress=False)
        first.append(torch.stack([o.samples[0].logprobs[0] for o in outputs]))
    torch.testing.assert_close(*first, rtol=0, atol=0.1)
