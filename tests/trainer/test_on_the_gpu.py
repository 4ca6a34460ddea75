"""A training step on a GPU: what it computes on the CPU, and how often the host waits."""

from dataclasses import dataclass, field

import pytest
import torch
from tiny_decoder import make_decoder

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import (
    AlgorithmConfig,
    CorrectionConfig,
    LoraConfig,
    OptimConfig,
    Sections,
)
from softgrpo.learner.lora import WithoutAdapters, add_adapters
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_kernels.methods import method_of

GROUPS, SAMPLES = 4, 3
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 0.3, -0.5, 0.2, 0.0, 0.0, 0.0, 2.0, -1.0, -0.5])
THINKING = {"end_of_thinking": 2}


@dataclass(frozen=True)
class Case:
    settings: DensitySettings = field(default_factory=DensitySettings)
    soft: SoftParams | None = field(default_factory=lambda: SoftParams(top_k=5))
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(tokens_per_microbatch=40))
    kl: bool = False
    checkpointing: bool = False
    rank: int = 0

    @property
    def config(self):
        return Sections(algorithm=self.algorithm, optim=self.optim)


OFFICIAL = SoftParams(top_k=5, noise_clip=(-1.5, 3.0), eps=1e-6)
BUDGET = SoftParams(top_k=5, max_soft_tokens=4, **THINKING)
CASES = {
    "exact": Case(),
    "official": Case(DensitySettings(method_of("gumbel", "official")), OFFICIAL),
    "concrete": Case(DensitySettings(method_of("gumbel", "concrete"))),
    "censored": Case(
        DensitySettings(method_of("gumbel", "censored"), tau=0.5, weight_floor=0.2),
        SoftParams(top_k=5, tau=0.5, weight_floor=0.2),
    ),
    "budget": Case(DensitySettings(max_soft_tokens=4), BUDGET),
    "dirichlet": Case(
        DensitySettings(method_of("dirichlet"), tau=1.0, noise_scale=2.0),
        SoftParams(top_k=5, noise="dirichlet", tau=1.0, noise_scale=2.0),
    ),
    "gaussian": Case(
        DensitySettings(method_of("gaussian"), tau=1.0, noise_scale=0.2),
        SoftParams(top_k=5, noise="gaussian", tau=1.0, noise_scale=0.2),
    ),
    "embedding": Case(
        DensitySettings(method_of("embedding"), tau=1.0, noise_scale=0.5),
        SoftParams(top_k=5, noise="embedding", tau=1.0, noise_scale=0.5),
    ),
    "discrete": Case(DensitySettings(soft_enabled=False), None),
    "whole vocabulary": Case(DensitySettings(soft_enabled=False, discrete_full=True), None),
    "kl": Case(algorithm=AlgorithmConfig(kl_coef=0.01), kl=True),
    "minibatches": Case(optim=OptimConfig(tokens_per_microbatch=40, minibatch_prompts=2)),
    "gspo": Case(algorithm=AlgorithmConfig(ratio_level="sequence")),
    "correction": Case(
        algorithm=AlgorithmConfig(correction=CorrectionConfig("truncate", "sequence", 1.2))
    ),
    "checkpointing": Case(checkpointing=True),
    "adapters": Case(rank=2),
    "adapters and kl": Case(algorithm=AlgorithmConfig(kl_coef=0.01), kl=True, rank=2),
}


@pytest.fixture(scope="module")
def rollouts():
    """A rollout of a case, drawn on the CPU by weights that are a little off."""
    made = {}

    def of(soft):
        if soft not in made:
            decoder = make_decoder(num_hidden_layers=2)
            with torch.no_grad():
                decoder.embed_weight.add_(0.02 * torch.randn_like(decoder.embed_weight))
            engine = LLM(decoder, kv_memory=0.01, max_batch_size=16, device="cpu")
            uids = [[10 * g + s for s in range(SAMPLES)] for g in range(GROUPS)]
            prompts = [[5, 6, 7, 8, 9][: 2 + g] for g in range(GROUPS)]
            params = SamplingParams(max_tokens=9, top_k=6, top_p=0.9)
            outputs = engine.generate_groups(prompts, params, soft or False, seed=3, uids=uids)
            made[soft] = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
        return made[soft]

    return of


def make_update(case, device, dtype=torch.float32):
    decoder = make_decoder(num_hidden_layers=2).to(device)
    decoder.gradient_checkpointing = case.checkpointing
    if case.rank:
        add_adapters(decoder, LoraConfig(rank=case.rank), seed=0)
    policy = Policy(decoder, case.settings, dtype)
    reference = None
    if case.kl and case.rank:
        reference = WithoutAdapters(policy)
    elif case.kl:
        frozen = make_decoder(num_hidden_layers=2).to(device).requires_grad_(False)
        with torch.no_grad():
            frozen.embed_weight.mul_(1.05)
        reference = Policy(frozen, case.settings, dtype)
    return Update(policy, reference, make_optimizer(decoder, case.optim))


def run(case, batch, device, dtype=torch.float32):
    """Metrics of two updates, and the gradient of the first: Adam turns a rounding of a gradient
    near 0 into a step of full size."""
    update = make_update(case, device, dtype)
    first, _ = update(batch, ADVANTAGES, 1e-4, case.config)
    parameters = update.policy.decoder.parameters()
    gradients = [p.grad.cpu().clone() for p in parameters if p.requires_grad]
    second, _ = update(batch, ADVANTAGES, 1e-4, case.config)
    return [first, second], gradients


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_cpu_computes(name, rollouts, device, float32_attention):
    case = CASES[name]
    batch = rollouts(case.soft)
    rows, gradients = run(case, batch, device)
    if device.type == "cpu":
        assert rows[0]["grad_norm"] > 0
        return
    expected_rows, expected = run(case, batch, torch.device("cpu"))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-4)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["exact", "discrete", "kl", "adapters"])
def test_bfloat16_runs_through(name, rollouts, device):
    """Under the real rules of flash attention."""
    case = CASES[name]
    (row, _), _ = run(case, rollouts(case.soft), device, torch.bfloat16)
    (expected, _), _ = run(case, rollouts(case.soft), torch.device("cpu"), torch.float32)
    for key in ("grad_norm", "sampling/sampling_logp_difference/mean"):
        assert row[key] == pytest.approx(expected[key], rel=0.1), key


@pytest.mark.parametrize("name", CASES)
def test_waits_of_an_update(name, rollouts, simulated_gpu, float32_attention):
    """One for each optimizer step, which must not happen where the gradient is not finite, and one
    for the numbers of the metrics; none for a pass. (Asked: at most 10, and 2 a pass.)"""
    case = CASES[name]
    update = make_update(case, torch.device("cuda"))
    batch = rollouts(case.soft)
    update(batch, ADVANTAGES, 1e-4, case.config)
    with simulated_gpu.counting() as counts:
        _, steps = update(batch, ADVANTAGES, 1e-4, case.config)
    assert steps >= 1
    assert counts.waits.total() == steps + 1, counts.table()
