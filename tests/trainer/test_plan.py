"""The plan of a run, against runs of small models whose memory is really there."""

import functools
import gc
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

from softgrpo.cli.train import main
from softgrpo.config import Config, ConfigError
from softgrpo.tools.plan import make_plan
from softgrpo.tools.plan.depth import peaks_and_flops
from softgrpo.tools.plan.device import DEVICE, FakeGPU
from softgrpo.tools.plan.model import model_config, write_empty_model
from softgrpo.tools.plan.plan import GIB, changes
from softgrpo.tools.plan.seconds import Hardware, Size, decode_step, kv_cache
from softgrpo.tools.plan.walk import PHASES, walk
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.weights import empty_decoder

aten = torch.ops.aten
SMALL = Qwen2Config(
    vocab_size=800,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
SETTINGS = [
    "data.max_prompt_tokens=64",
    "rollout.max_new_tokens=192",
    "rollout.group_size=4",
    "optim.tokens_per_microbatch=1024",
]


def small(*overrides):
    return Config.load("paper-1.5b", [*SETTINGS, *overrides])


def deep(layers):
    # Tables of the size of many layers, as those of shallow models are.
    values = SMALL.to_dict() | {"num_hidden_layers": layers, "vocab_size": 30000}
    return Qwen2Config.from_dict(values | {"layer_types": ["full_attention"] * layers})


def of_phases(peaks):
    phases = {phase for phase, _ in peaks if phase}
    return {p: max(peak for (phase, _), peak in peaks.items() if phase == p) for p in phases}


class RealGPU:
    """The simulated GPU in the place of a fake one: what its allocator gave out."""

    def __init__(self, device):
        self.core, self.place, self.peaks = device.core, ("", ""), {}

    def enter_place(self, phase, part=""):
        _, peak = self.core.memory()
        self.peaks[self.place] = max(peak, self.peaks.get(self.place, 0))
        self.place = (phase, part)
        self.core.reset_peak()

    def __enter__(self):
        self.core.reset_peak()

    def __exit__(self, *_):
        self.enter_place("")


class CountingGPU(RealGPU):
    """products: of matrices, in the passes of a step."""

    def __init__(self, device, counter):
        super().__init__(device)
        self.counter, self.products = counter, 0

    def enter_place(self, phase, part=""):
        super().enter_place(phase, part)
        counted = self.counter.get_flop_counts().get("Global", {})
        if phase == "sync":  # it multiplies nothing, and the rollout comes behind it
            self.products = sum(counted.get(op, 0) for op in (aten.mm, aten.addmm))


@functools.cache
def planned(checkpointing):
    """The walk of `small`, by phase: (peaks, operations)."""
    fake = FakeGPU()
    config = small(f"optim.gradient_checkpointing={checkpointing}")
    walk(fake, config, SMALL, SMALL.num_hidden_layers, 1)
    return of_phases(fake.peaks), fake.flops


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_small_model_takes_what_is_planned(simulated_gpu, checkpointing):
    config = small(f"optim.gradient_checkpointing={checkpointing}")
    real = RealGPU(simulated_gpu)
    gc.collect()  # models of other tests
    before, _ = simulated_gpu.core.memory()
    walk(real, config, SMALL, SMALL.num_hidden_layers, 1)
    measured = {phase: peak - before for phase, peak in of_phases(real.peaks).items()}
    peaks, _ = planned(checkpointing)
    assert set(measured) == set(peaks) == set(PHASES)
    for phase in PHASES:
        assert peaks[phase] == pytest.approx(measured[phase], rel=0.01), phase


def test_two_shallow_models_tell_of_a_deep_one():
    gpus, model = 64, deep(6)
    config = small("rollout.sleep=always", "rollout.group_size=80")
    peaks, flops = peaks_and_flops(config, model, gpus)
    whole = FakeGPU()
    walk(whole, config, model, 6, gpus)
    assert flops == pytest.approx(whole.flops)
    assert peaks == pytest.approx(of_phases(whole.peaks), rel=1e-3)


def test_the_operations_are_those_of_a_real_step(simulated_gpu):
    config = small("optim.gradient_checkpointing=true")
    with FlopCounterMode(display=False) as counter:
        real = CountingGPU(simulated_gpu, counter)
        walk(real, config, SMALL, SMALL.num_hidden_layers, 1)
    _, flops = planned("true")
    assert sum(flops.values()) == real.products


def test_a_real_gpu_that_is_in_use_is_let_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    planned("true")


def test_a_gpu_beside_a_cpu_with_fast_products_holds_the_weights_once(monkeypatch):
    monkeypatch.setattr("softgrpo_engine.model.projections.is_fastest", lambda dtype: True)
    with FakeGPU() as gpu:
        decoder = empty_decoder(DecoderConfig.from_hf(SMALL, ()), torch.bfloat16, DEVICE)
        weights = gpu.held
        decoder.pack()
        assert gpu.held == pytest.approx(weights, rel=0.01)


def test_the_recipes_are_planned_without_a_network():
    sizes = {"paper-1.5b": 1.78, "paper-3b": 3.21, "paper-7b": 7.62}
    for recipe, billions in sizes.items():
        model = model_config(Config.load(recipe).model.path)
        size = Size.of(DecoderConfig.from_hf(model, ()))
        assert size.parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_command_says_what_to_change_and_exits_1(tmp_path, capsys, monkeypatch):
    write_empty_model(SMALL, 4, tmp_path / "model")
    rows, model = tmp_path / "rows.json", f"model.path={tmp_path / 'model'}"
    one = ["rollout.prompts_per_step=1", "optim.minibatch_prompts=null", "rollout.group_size=8"]
    command = ["--plan", "--json", str(rows), "--config", "paper-1.5b", model, *SETTINGS, *one]
    assert main(command) == 0
    found = json.loads(rows.read_text())
    assert [row["phase"] for row in found] == [p for p in PHASES if p != "old densities"]
    assert {row["gpus"] for row in found} == {1}
    peak = max(row["peak_gib"] for row in found)
    assert "does not fit" not in capsys.readouterr().out
    tiny = Hardware(memory=0.5 * peak * 2**30, reserved=0)
    monkeypatch.setattr("softgrpo.tools.plan.plan.Hardware", lambda: tiny)
    assert main([*command, "optim.gradient_checkpointing=false"]) == 1
    assert "set optim.gradient_checkpointing=true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "context", "seconds"), [(64, 384, 2.24e-3), (64, 1800, 2.94e-3), (32, 4900, 3.15e-3)]
)
def test_a_decode_step_takes_what_it_took_on_an_h200(rows, context, seconds):
    size = Size.of(DecoderConfig.from_hf(model_config(Config.load("paper-1.5b").model.path), ()))
    measured = Hardware(bandwidth=4.2e12)  # of a copy there
    assert decode_step(size, measured, rows, rows * context) == pytest.approx(seconds, rel=0.04)


def test_the_cache_takes_what_is_left():
    """The proposed rollout.kv_memory fits, and one GiB more would not."""
    config = small("rollout.max_new_tokens=80000", "rollout.max_batch_size=1024")
    config = replace(config, optim=replace(config.optim, tokens_per_microbatch=100000))
    model = deep(40)
    size = Size.of(DecoderConfig.from_hf(model, ()))
    cache = kv_cache(config, size, 1)
    usable = cache - 3.5 * GIB
    peaks = {phase: round(cache + GIB) for phase in ("start", "rollout", "sync")}
    assert changes(config, size, 1, peaks, usable) == [
        f"set rollout.kv_memory={int(cache / GIB - 4.5)}"
    ]


@pytest.mark.parametrize(
    "override", ["optim.name=adamw_8bit", "rollout.engine=hf", "model.dtype=float32"]
)
def test_what_a_plan_does_not_know_is_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        make_plan(Config.load("paper-1.5b", [override]))
