"""A run with adapters: what it trains, leaves and continues."""

import json

import pytest
import torch
from checkpoints import weights_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from softgrpo import Config
from softgrpo.cli.train import main

peft = pytest.importorskip("peft")


def train(config, *overrides):
    keys = ["lora.rank=4", "lora.alpha=8", "optim.lr=3e-2", "algorithm.kl_coef=0.01"]
    keys += ["optim.minibatch_prompts=null"]
    assert main(["--config", str(config), *keys, *overrides]) == 0


def test_adapters_are_trained_exported_merged_and_resumed(
    tiny_config, tiny_model, tmp_path, rounding
):
    train(tiny_config, "run.name=whole")
    train(tiny_config, "run.name=halves", "run.max_steps=3")
    train(tiny_config, "run.name=halves", "run.resume=auto")
    whole, halves = (tmp_path / "runs" / name for name in ("whole", "halves"))
    weights = weights_of(whole / "checkpoints" / "step_000006")
    for name, tensor in weights_of(halves / "checkpoints" / "step_000006").items():
        assert torch.equal(tensor, weights[name]), name

    # A weight that is not trained is kept in the dtype of the computation.
    dtype = getattr(torch, Config.load(tiny_config).model.dtype)
    start = load_file(tiny_model / "model.safetensors")
    for name, tensor in weights.items():
        if "lora_B" in name:
            assert tensor.abs().max() > 0, name
        elif "lora_A" not in name:
            frozen = start[name.replace(".base_layer", "")].to(dtype)
            assert torch.equal(tensor.to(dtype), frozen), name

    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kl = [row["kl"] for row in rows if "kl" in row]
    assert abs(kl[0]) < min(1e-6 if dtype == torch.float32 else 1e-3, kl[-1])
    assert kl[-1] > 1e-3
    # The engine drew from the merged weights.
    differences = [row.get("sampling/sampling_logp_difference/max", 0.0) for row in rows]
    assert 0 < max(differences) < rounding

    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(plain, whole / "adapter").merge_and_unload()
    exported = load_file(whole / "model" / "model.safetensors")
    changed = 0
    for name, tensor in exported.items():
        expected = merged.get_parameter(name).detach().to(torch.bfloat16)
        assert (tensor.float() - expected.float()).abs().max() <= 2**-7 * expected.abs().max(), name
        changed += not torch.equal(tensor, start[name].to(torch.bfloat16))
    assert changed == 7
