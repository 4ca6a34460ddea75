"""The optimizers that `optim.name` names, and that a checkpoint brings their state back."""

import json

import pytest
import torch
from torch import nn

from softgrpo.config.sections import OptimConfig
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.run.checkpoint import STATE_FILE, load_checkpoint, write_tensors

NAMES = ["adamw", "adamw_8bit"]


def make_model(device="cpu"):
    """A weight that is large enough for 8 bits (4096 elements), a bias that is not."""
    torch.manual_seed(0)
    return nn.Linear(128, 64).to(device)


def make(name, model):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    return make_optimizer(model, OptimConfig(name=name, lr=1e-2, weight_decay=0.1))


def step(model, optimizer, seed):
    inputs = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
    inputs = inputs.to(model.weight.device)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def test_8_bits_hold_the_moments_and_follow_adamw(device):
    models = [make_model(device), make_model(device)]
    start = models[0].weight.detach().clone()
    optimizers = [make(name, model) for name, model in zip(NAMES, models, strict=True)]
    steps = 20 if device.type == "cpu" else 4  # its kernels are interpreted on a simulated GPU
    for seed in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, seed)
    sizes = []
    for model, optimizer in zip(models, optimizers, strict=True):
        state = optimizer.state[model.weight].values()
        moments = [x for x in state if isinstance(x, torch.Tensor) and x.shape == start.shape]
        assert len(moments) == 2
        sizes.append(sum(x.numel() * x.element_size() for x in moments))
    assert sizes == [8 * start.numel(), 2 * start.numel()]
    moved = (models[0].weight - start).norm()
    assert (models[1].weight - models[0].weight).norm() < 0.1 * moved


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path, device):
    model = make_model(device)
    optimizer = make(name, model)
    for seed in range(3):
        step(model, optimizer, seed)
    write_tensors(tmp_path, model, optimizer)
    (tmp_path / STATE_FILE).write_text(json.dumps({"step": 3}))
    other = make_model(device)
    loaded = make(name, other)
    load_checkpoint(tmp_path, other, loaded)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, loaded, seed)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_frozen_parameters_have_no_state():
    model = make_model()
    model.bias.requires_grad_(False)
    optimizer = make("adamw", model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
