"""The start of a run: what it holds in memory, and that each process has its part of a model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import peak_memory
from ranks import bytes_of, of_first, of_pass, of_start, start, tensors_of
from tiny_decoder import CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config import Config
from softgrpo.config.sections import LoraConfig
from softgrpo.distributed import World
from softgrpo.learner.lora import add_adapters, merged_tensors
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.model.weights import load_decoder
from softgrpo_engine.ops.linear import has_bf16_products
from softgrpo_kernels.methods import method_of

MODELS = {"tied": True, "untied": False}
# A vocabulary that two processes cannot share equally, and that is most of the model.
VOCABULARY = 2501
SETTINGS = {
    "thoughts": (SoftParams(top_k=5, max_soft_tokens=4), DensitySettings(max_soft_tokens=4)),
    "noise on the mixture": (
        SoftParams(top_k=5, noise="embedding", tau=1.0, noise_scale=0.5),
        DensitySettings(method_of("embedding"), tau=1.0, noise_scale=0.5),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`tied`, `untied`: models in bfloat16 on disk; `batches.pt`: rollouts of the first."""
    path = tmp_path_factory.mktemp("models")
    for name, tied in MODELS.items():
        torch.manual_seed(0)
        shape = CONFIG | {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        model.to(torch.bfloat16).save_pretrained(path / name)
    engine = LLM(load_decoder(path / "tied"), kv_memory=0.01, max_batch_size=16, device="cpu")
    batches, params = {}, SamplingParams(max_tokens=9, top_k=6)
    for name, (soft, settings) in SETTINGS.items():
        prompts = [[5, 6, 7, 7], [7, 8], [5, 5, 5]]
        uids = [[10 * g + s for s in range(4)] for g in range(3)]
        outputs = engine.generate_groups(prompts, params, soft, seed=3, uids=uids)
        batch = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
        batches[name] = batch, settings
    torch.save(batches, path / "batches.pt")
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    """What two processes found."""
    command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    both = [subprocess.Popen([*command, str(r), "2", str(folder)], env=env) for r in (0, 1)]
    assert [process.wait(200) for process in both] == [0, 0]
    return [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in (0, 1)]


def mapped(folder, model):
    """Bytes of the file: PyTorch counts as allocated what safetensors maps into memory."""
    return (folder / model / "model.safetensors").stat().st_size


def assert_equal_tensors(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
def test_one_process_holds_the_weights_and_one_tensor(model, folder):
    found = of_start(folder / model, World())
    weights = sum(p.numel() for p in load_decoder(folder / model).parameters())
    assert found["held"] == (4 + 2) * weights
    assert found["held"] <= found["peak"] < found["held"] + mapped(folder, model) + 2**16
    policy, reference = found["tensors"]
    loaded = load_decoder(folder / model, torch.float32)
    expected = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert_equal_tensors(policy, expected)
    assert reference.pop("inverse_frequencies").dtype == torch.float32
    for name, tensor in reference.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_adapters_add_no_second_model(model, folder):
    pytest.importorskip("peft")
    found = []

    def run():
        found.extend(start(folder / model, World(), "lora.rank=3"))

    peak = peak_memory(run)
    policy, reference = found
    assert reference.policy is policy
    assert peak < bytes_of(policy) + mapped(folder, model) + 2**16
    expected = load_decoder(folder / model)
    for (name, tensor), (other, weight) in zip(
        merged_tensors(policy.decoder), expected.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor, weight.to(tensor.dtype)), name
    add_adapters(expected, LoraConfig(rank=3), Config.load("demo").run.seed)
    assert_equal_tensors(dict(policy.decoder.named_parameters()), dict(expected.named_parameters()))
    assert sum(p.any() for name, p in expected.named_parameters() if ".lora_A." in name) == 7


def test_a_gpu_holds_the_weights_and_one_tensor(folder, gpu):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policies = start(folder / "untied", World(), device=gpu)
    peak, held = torch.cuda.max_memory_allocated() - before, sum(map(bytes_of, policies))
    # As it comes from the file, in bfloat16; and what an allocator adds to each.
    assert held <= peak < held + 2 * VOCABULARY * CONFIG["hidden_size"] + 2**16
    for policy, expected in zip(policies, start(folder / "untied", World()), strict=True):
        tensors = {name: tensor.cpu() for name, tensor in tensors_of(policy).items()}
        assert_equal_tensors(tensors, tensors_of(expected))


@pytest.mark.parametrize("model", MODELS)
def test_each_of_two_processes_holds_its_part_and_one_tensor(model, folder, ranks):
    one = of_start(folder / model, World())
    assert sum(rank[model]["held"] for rank in ranks) == one["held"]
    table = VOCABULARY * CONFIG["hidden_size"]
    for rank in ranks:
        found = rank[model]
        assert found["held"] < 0.51 * one["held"]
        assert found["peak"] < found["held"] + mapped(folder, model) + 4 * table
        # One whole table in float32 at a time, what it is put together from, and a padded shard.
        assert found["sync"] < (1 + 1 + 0.5) * 4 * table + 2**16
        for ours, expected in zip(found["tensors"], one["tensors"], strict=True):
            assert_equal_tensors(ours, expected)
        assert_equal_tensors(rank["replicated", model], one["tensors"][0])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_have_the_gradient_of_one(model, dtype, name, folder, ranks):
    """Gathered in bfloat16, also embeddings and head, and summed in float32.

    One process has the gradient of a norm and of a layer's bias in float32, and on a CPU without
    bfloat16 products of a layer's weight; what FSDP gathers has it in its own dtype, rounded by
    each process.
    """
    policy, reference = start(folder / model, World(), f"model.dtype={dtype}")
    batch, settings = torch.load(folder / "batches.pt", weights_only=False)[name]
    for rank, found in enumerate(ranks):
        ours = found[model, dtype, name]
        samples = World(rank, 2).share(range(len(batch.group)))
        one = of_pass(policy, batch, settings, samples)
        assert ours["table"] == getattr(torch, dtype)
        assert torch.equal(ours["density"], one["density"])
        density, sharded = ours["reference"]
        assert sharded
        assert torch.equal(density, of_first(reference, batch, settings, samples)[0])
    for rank in ranks:
        gradients = rank[model, dtype, name]["gradients"]
        for key, expected in one["gradients"].items():
            expected = expected / 2  # FSDP takes the mean
            assert gradients[key].dtype == torch.float32
            error = (gradients[key] - expected).abs().max()
            of_layer = ".layers." in key and (key.endswith("bias") or not has_bf16_products())
            rounded = "norm" in key or of_layer
            bound = torch.finfo(torch.bfloat16).eps if rounded and dtype == "bfloat16" else 1e-5
            assert error <= bound * expected.abs().max(), key


@pytest.mark.parametrize("wrong", ["unknown", "shape", "missing"])
def test_a_model_that_does_not_fit_is_named(wrong, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "tied" / "model.safetensors")
    norm = "model.norm.weight"
    says = {
        "unknown": "weight 'more' does not belong to this model",
        "shape": rf"weight '{norm}' has shape \[3\], the model has \[32\]",
        "missing": f"1 weights are missing, first: '{norm}'",
    }
    if wrong == "unknown":
        tensors["more"] = torch.zeros(1)
    elif wrong == "shape":
        tensors[norm] = torch.zeros(3)
    else:
        del tensors[norm]
    (tmp_path / "config.json").write_text((folder / "tied" / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=says[wrong]):
        start(tmp_path, World())
