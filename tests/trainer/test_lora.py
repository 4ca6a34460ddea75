"""Adapters: their gradient, what the engine and peft make of them, and runs with them."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from softgrpo.algorithm.density import mismatch, rollout_logq
from softgrpo.algorithm.positions import DensitySettings
from softgrpo.cli.train import main
from softgrpo.config.sections import LoraConfig
from softgrpo.learner.lora import WithoutAdapters, add_adapters, merged_tensors
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.run.export import export_adapter
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.model.weights import load_decoder
from softgrpo_engine.training.group_attention import GroupAttention

peft = pytest.importorskip("peft")
SETTINGS = DensitySettings()
LORA = LoraConfig(rank=3, alpha=7.0)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model_path(request, tmp_path_factory):
    """With biases and tied embeddings, and without."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        tie_word_embeddings=request.param == "qwen2",
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(path)
    return path


def adapted(path, config=LORA):
    """The decoder with adapters as training leaves them: B is not 0."""
    decoder = load_decoder(path, torch.float32)
    add_adapters(decoder, config, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder.train()


def engine_of(path):
    return LLM(load_decoder(path, torch.float32), kv_memory=0.01, max_batch_size=16)


def roll(engine):
    params = SamplingParams(max_tokens=12)
    outputs = engine.generate_groups([[5, 6, 7]], params, SoftParams(), seed=3, uids=[[0, 1, 2]])
    return RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)


def logits_of(decoder, ids):
    config = decoder.config
    attention = GroupAttention([len(ids)], [[]], config.num_heads, config.num_kv_heads)
    embeds = torch.nn.functional.embedding(ids, decoder.embed_weight)
    return decoder.logits(decoder(embeds, torch.arange(len(ids)), attention))


@pytest.mark.parametrize("modules", [list(LORA.target_modules), ["v_proj", "down_proj"]])
def test_the_exported_adapter_gives_the_same_logits_in_peft(model_path, modules, tmp_path):
    decoder = adapted(model_path, LoraConfig(rank=3, alpha=7.0, target_modules=modules))
    export_adapter(decoder, "some/model", tmp_path, write=True)
    ids = torch.tensor([5, 9, 40, 3, 17, 8])
    plain = AutoModelForCausalLM.from_pretrained(model_path).eval()
    with torch.no_grad():
        unadapted = plain(ids[None]).logits[0]
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()(ids[None]).logits[0]
        ours = logits_of(decoder, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - unadapted).abs().max() > 0.03
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"]) == (3, 7.0)
    assert sorted(config["target_modules"]) == sorted(modules)


def test_the_engine_draws_from_the_merged_weights(model_path):
    decoder = adapted(model_path)
    engine = engine_of(model_path)

    def difference(batch):
        scored = Policy(decoder, SETTINGS, torch.float32)(batch)
        theirs = rollout_logq(scored.positions, SETTINGS)
        difference, known = mismatch(scored.candidates, theirs, scored.positions.classes)
        return difference[known].max()

    assert difference(roll(engine)) > 1e-2
    engine.update_weights(merged_tensors(decoder), version=1)
    assert difference(roll(engine)) < 1e-4


def test_without_adapters_the_policy_is_the_first_model(model_path):
    """Bit for bit that of a copy, and the policy's own pass does not notice, recomputed or not."""
    batch = roll(engine_of(model_path))
    policy = Policy(adapted(model_path), SETTINGS, torch.bfloat16)
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = []
    for recompute in (False, True):
        policy.decoder.gradient_checkpointing = recompute
        new = policy(batch)
        with torch.no_grad():
            first = WithoutAdapters(policy)(batch)
        found.append(torch.autograd.grad(new.density.sum(), trained))
    copy = Policy(load_decoder(model_path, torch.float32), SETTINGS, torch.bfloat16)
    assert torch.equal(first.terms, copy(batch).terms)
    assert (first.terms - new.terms).abs().max() > 1e-2
    alone = torch.autograd.grad(policy(batch).density.sum(), trained)
    for gradients in found:
        assert all(map(torch.equal, gradients, alone))
    assert all(p.requires_grad for p in trained)


def test_gradients_are_those_of_the_merged_weight(model_path):
    """dB = s dW A', dA = s B' dW; nothing else has one."""
    ids = torch.tensor([5, 9, 40, 3, 17, 8])
    decoder = adapted(model_path)
    logits_of(decoder, ids).square().sum().backward()
    merged = load_decoder(model_path, torch.float32).train()
    with torch.no_grad():
        for (_, parameter), (_, tensor) in zip(
            merged.named_parameters(), merged_tensors(decoder), strict=True
        ):
            parameter.copy_(tensor)
    logits_of(merged, ids).square().sum().backward()
    weights, scale, seen = dict(merged.named_parameters()), LORA.alpha / LORA.rank, 0
    parameters = dict(decoder.named_parameters())
    for name, parameter in parameters.items():
        if "lora_A" not in name:
            assert parameter.requires_grad == ("lora_B" in name)
            continue
        other = parameters[name.replace("lora_A", "lora_B")]
        d_weight = weights[name.replace(".lora_A.default", "")].grad
        for grad, expected in (
            (parameter.grad, scale * other.detach().mT @ d_weight),
            (other.grad, scale * d_weight @ parameter.detach().mT),
        ):
            assert (grad - expected).abs().max() < 1e-4 * expected.abs().max(), name
            seen += 1
    assert seen == 2 * 2 * 7


def test_adapters_start_at_the_model_and_depend_on_the_seed_alone(model_path):
    plain, first, second = (load_decoder(model_path, torch.bfloat16) for _ in range(3))
    state = torch.get_rng_state()
    add_adapters(first, LORA, seed=1)
    torch.rand(3)
    add_adapters(second, LORA, seed=1)
    torch.set_rng_state(state)
    for (name, tensor), (expected_name, expected) in zip(
        merged_tensors(first), plain.named_parameters(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(tensor.to(torch.bfloat16), expected), name
    for (name, ours), (_, theirs) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == (torch.float32 if "lora" in name else torch.bfloat16)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("lora.rank=4", "pip install 'softgrpo[peft]'"),
        ("optim.name=adamw_8bit", "pip install bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(key, remedy, monkeypatch, capsys):
    monkeypatch.setattr("softgrpo.config.checks.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--config", "demo", key])
    assert remedy in capsys.readouterr().err
