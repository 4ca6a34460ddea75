"""Memory and weights: sleep gives both back, wake and update_weights bring them, never old ones."""

import gc
import weakref

import pytest
import torch

from softgrpo_engine import LLM, SamplingParams, SoftParams

PARAMS = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)


def tokens(llm, prompt):
    return llm.generate(prompt, PARAMS, SoftParams(), progress=False)[0].samples[0].token_ids


def tensor_bytes():
    """Memory of all tensors that are alive, each storage once."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # and not what stands for one in PyTorch's compiler
    alive = [x for x in gc.get_objects() if type(x) in plain]
    storages = [x.untyped_storage() for x in alive if x.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def of_directory(tmp_path, hf_model, tokenizer, device):
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return LLM(tmp_path, dtype="float32", max_batch_size=4, max_model_len=128)


def test_sleep_gives_the_memory_of_cache_and_weights_back(of_directory, prompts):
    llm = of_directory
    first = tokens(llm, prompts[3])
    weights = sum(p.nbytes for p in llm.runner.decoder.parameters())
    cache = llm.runner.k_pages.nbytes + llm.runner.v_pages.nbytes
    decoder, before = weakref.ref(llm.runner.decoder), tensor_bytes()
    llm.sleep()
    assert decoder() is None
    freed = before - tensor_bytes()
    # More than the weights themselves where they are packed a second time.
    assert weights > 1e5
    assert cache > 1e5
    assert freed >= weights + cache
    with pytest.raises(RuntimeError, match=r"wake\(\)"):
        tokens(llm, prompts[3])
    llm.wake()
    assert llm.metrics()["prefix_tokens_reused"] == 0
    assert tokens(llm, prompts[3]) == first
    assert llm.metrics()["prefix_tokens_reused"] == 0, "the cache of before is gone"


def test_sleep_of_the_cache_alone_keeps_the_weights(make_llm, prompts):
    llm = make_llm()
    first = tokens(llm, prompts[3])
    cache = llm.runner.k_pages.nbytes + llm.runner.v_pages.nbytes
    on_gpu = llm.device.type == "cuda"
    count = torch.cuda.memory_allocated if on_gpu else tensor_bytes
    decoder, before = llm.runner.decoder, count()
    for _ in range(2):  # a second time, nothing is left to give back
        llm.sleep(weights=False)
        assert before - count() == cache
        with pytest.raises(RuntimeError, match=r"wake\(\)"):
            tokens(llm, prompts[3])
    llm.wake()
    assert count() == before
    assert llm.runner.decoder is decoder
    assert tokens(llm, prompts[3]) == first
    assert llm.metrics()["prefix_tokens_reused"] == 0, "the cache of before is gone"


@pytest.mark.parametrize("update_first", [True, False])
def test_updated_weights_do_not_fall_back_to_those_of_the_model(
    of_directory, hf_model, prompts, update_first
):
    llm = of_directory
    first = tokens(llm, prompts[0])
    state = {name: 0.9 * w for name, w in hf_model.state_dict().items() if name != "lm_head.weight"}
    llm.update_weights(state.items(), version=1)
    updated = tokens(llm, prompts[0])
    assert updated != first
    llm.sleep()
    if update_first:
        llm.update_weights(state.items(), version=2)
        with pytest.raises(RuntimeError, match=r"wake\(\)"):
            tokens(llm, prompts[0])
        llm.wake()
    else:
        llm.wake()
        with pytest.raises(RuntimeError, match=r"no weights since it slept.*update_weights\(\)"):
            tokens(llm, prompts[0])
        llm.update_weights(state.items(), version=2)
    assert tokens(llm, prompts[0]) == updated
    assert llm.metrics()["weight_version"] == 2


def test_the_weights_of_a_decoder_must_be_given_again(make_llm, hf_model, prompts):
    llm = make_llm()
    first = tokens(llm, prompts[0])
    llm.sleep()
    llm.wake()
    with pytest.raises(RuntimeError, match="no weights"):
        tokens(llm, prompts[0])
    llm.update_weights(hf_model.state_dict().items(), version=1)
    assert tokens(llm, prompts[0]) == first


def test_half_an_update_is_not_generated_with(make_llm, hf_model, prompts):
    llm = make_llm()
    first = tokens(llm, prompts[0])
    state = dict(hf_model.state_dict())
    half = {name: 0.5 * w for name, w in state.items() if "layers.0" in name}
    with pytest.raises(ValueError, match="weights are missing"):
        llm.update_weights(half.items(), version=1)
    with pytest.raises(RuntimeError, match=r"an update failed: call update_weights\(\)"):
        tokens(llm, prompts[0])
    assert llm.metrics()["weight_version"] == 0
    llm.update_weights(state.items(), version=1)
    assert tokens(llm, prompts[0]) == first


@pytest.mark.parametrize("action", ["sleep", "update_weights"])
def test_neither_happens_under_running_samples(make_llm, hf_model, prompts, action):
    llm = make_llm()
    stream = llm.stream(prompts[0], PARAMS)
    next(stream)
    arguments = (hf_model.state_dict().items(), 1) if action == "update_weights" else ()
    with pytest.raises(RuntimeError, match=f"{action} while samples are in progress"):
        getattr(llm, action)(*arguments)
    assert len(list(stream)) == PARAMS.max_tokens - 1
    getattr(llm, action)(*arguments)


def test_broken_weights_name_the_sample_and_the_version(make_llm, hf_model, prompts):
    llm = make_llm()
    state = {k: v.clone() for k, v in hf_model.state_dict().items()}
    state["model.norm.weight"][3] = float("nan")
    llm.update_weights(state.items(), version=12)
    with pytest.raises(FloatingPointError, match=r"uid 41\b.*weight version 12"):
        llm.generate_groups(prompts[:1], SamplingParams(max_tokens=8), seed=0, uids=[[41, 42]])
    # The engine is usable again once the weights are.
    llm.update_weights(iter(hf_model.state_dict().items()), version=13)
    llm.generate(prompts, SamplingParams(max_tokens=2), progress=False)
