"""TRL's trainer on our rollouts, beside our own trainer and beside TRL's own numbers."""

import pytest
import torch

pytest.importorskip("trl.trainer", reason="TRL is not installed: make test-trl")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import AlgorithmConfig, CorrectionConfig, Sections
from softgrpo.distributed import World
from softgrpo.learner.passes import Passes
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.sampling import rollout_uids
from softgrpo.trl import SoftConfig, SoftGRPOTrainer
from softgrpo_engine import Output
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.weights import empty_decoder, load_weights

ROWS = [{"prompt": text} for text in ("aaabac", "adaeafagah", "bb", "cacbccabcd")]
PROMPTS, SAMPLES, LONGEST = 2, 4, 9


@pytest.fixture(scope="module")
def model_path(hf_model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def reward(completions, **columns):
    return [float(text.count("a") + text.count("e")) for text in completions]


def make_trainer(
    model, folder, *, cls=SoftGRPOTrainer, soft=None, objective="exact", peft=None, **changes
):
    """A trainer of one pass over PROMPTS prompts with SAMPLES samples each."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": LONGEST,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    options = {"soft": soft, "objective": objective} if cls is SoftGRPOTrainer else {}
    args = GRPOConfig(**settings)
    trainer = cls(model, reward, args, Dataset.from_list(ROWS), peft_config=peft, **options)
    trainer.current_gradient_accumulation_steps = 1  # as in its loop
    trainer.model.train()
    return trainer


def decoder_of(model):
    """Our decoder with the weights of a model of transformers."""
    decoder = empty_decoder(DecoderConfig.from_hf(model.config), torch.float32, "cpu")
    load_weights(decoder, iter([(n, p.detach()) for n, p in model.named_parameters()]))
    return decoder


def shift(model, scale, seed):
    """Other weights, a little off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


# Soft settings, the objective, TRL's loss and our name of it, beta, correction (mode, level).
CASES = {
    "exact": ({}, "exact", "dapo", "token", 0.0, ("none", "token")),
    "truncated ratios": (
        {"tau": 0.5}, "exact", "grpo", "sequence", 0.0, ("truncate", "token")
    ),
    "masked sequences and KL": (
        {"end_of_thinking": 2}, "concrete", "dr_grpo", "constant", 0.1, ("mask", "sequence")
    ),
    "forced end and KL": (
        {"max_soft_tokens": 3, "end_of_thinking": 2, "tau": 0.7, "weight_floor": 0.2},
        "censored", "bnpo", "token", 0.3, ("none", "token"),
    ),
    "answers of few candidates": (
        {"max_soft_tokens": 3}, "exact", "grpo", "sequence", 0.0, ("none", "token")
    ),
    "sign of the advantage": (
        {"max_soft_tokens": 5}, "latent_grpo", "dapo", "token", 0.0, ("none", "token")
    ),
    "noise on the mixture": (
        {"noise": "embedding", "tau": 1.0, "noise_scale": 0.3}, "exact", "dapo", "token", 0.0,
        ("none", "token"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_our_trainer(case, model_path, tmp_path):
    """The engine, the policy before the update, the policy and the reference: four sets of weights,
    so that every ratio is at work."""
    soft, objective, loss_type, aggregation, beta, (mode, level) = CASES[case]
    bound = 1.5
    mode_of_trl = f"{level}_{mode}" if mode != "none" else "token_truncate"
    top_k = 6 if case == "answers of few candidates" else 0
    trainer = make_trainer(
        model_path,
        tmp_path,
        soft=SoftConfig(**soft),
        objective=objective,
        loss_type=loss_type,
        scale_rewards="none",
        beta=beta,
        delta=3.0,
        use_bias_correction_kl=False,
        top_k=top_k,
        num_iterations=2,
        vllm_importance_sampling_correction=mode != "none",
        vllm_importance_sampling_mode=mode_of_trl,
        vllm_importance_sampling_clip_max=bound,
        vllm_importance_sampling_clip_min=1 / bound if mode == "mask" else None,
    )
    trainer._sync_weights()
    reference = decoder_of(trainer.model)
    shift(trainer.model, 0.01, seed=1)
    before = decoder_of(trainer.model)
    rows = [row for row in ROWS[:PROMPTS] for _ in range(SAMPLES)]
    inputs = trainer._generate_and_score_completions(rows)
    shift(trainer.model, 0.01, seed=2)
    policy = decoder_of(trainer.model)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    # The same by ours: each group's prompt once, packed instead of padded.
    settings = trainer.settings
    records = inputs["record"]
    outputs = [
        Output(part[0].prompt_token_ids, [row.samples[0] for row in part])
        for part in (records[g : g + SAMPLES] for g in range(0, len(records), SAMPLES))
    ]
    batch = RolloutBatch.from_outputs(outputs, seed=42, stream=0, weight_version=0)
    config = Sections(
        algorithm=AlgorithmConfig(
            objective=objective,
            loss_aggregation=aggregation,
            kl_coef=beta,
            kl_estimator="k3",
            correction=CorrectionConfig(mode, level, bound),
        ),
        rollout=trainer._run.rollout,
    )
    samples = list(range(len(records)))

    def passes(decoder):
        other = Policy(reference, settings, torch.float32) if beta else None
        return Passes(Policy(decoder, settings, torch.float32), other, batch, config, World())

    old = passes(before).densities(samples)
    update = passes(policy)
    update.backward(samples, samples, inputs["advantages"], old)
    (total,) = (s for n, s in update.statistics.summaries().items() if n == "loss")
    assert loss.item() == pytest.approx(total.total, rel=1e-4, abs=1e-5)
    assert abs(loss.item()) > 1e-3
    for name, theirs in trainer.model.named_parameters():
        ours = policy.get_parameter(name).grad
        scale = theirs.grad.abs().max()
        assert scale > 0
        assert (ours - theirs.grad).abs().max() < 1e-4 * max(1.0, float(scale)), name
    assert len({len(row.samples[0].token_ids) for row in records}) > 1 or case != "exact"
    if case == "forced end and KL":
        assert (inputs["tool_mask"] * inputs["completion_mask"]).sum() < inputs[
            "completion_mask"
        ].sum()
    if "latent" not in objective:
        assert trainer._metrics["train"]["sampling/sampling_logp_difference/max"] or mode == "none"
