"""TRL's trainer on our rollouts, beside our own trainer and beside TRL's own numbers."""

import pytest
import torch
import transformers

pytest.importorskip("trl.trainer", reason="TRL is not installed: make test-trl")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from softgrpo.config.sections import AlgorithmConfig, CorrectionConfig, Sections
from softgrpo.distributed import World
from softgrpo.learner.passes import Passes
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.sampling import rollout_uids
from softgrpo.trl import SoftConfig, SoftGRPOTrainer
from softgrpo_engine import Output, SoftParams
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.weights import empty_decoder, load_weights

ROWS = [{"prompt": text} for text in ("aaabac", "adaeafagah", "bb", "cacbccabcd")]
PROMPTS, SAMPLES, LONGEST = 2, 4, 9


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def model_path(hf_model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def reward(completions, **columns):
    return [float(text.count("a") + text.count("e")) for text in completions]


def make_trainer(
    model,
    folder,
    *,
    cls=SoftGRPOTrainer,
    soft=None,
    objective="exact",
    engine="native",
    peft=None,
    **changes,
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
        "logging_steps": 1,
        **changes,
    }
    own = {"soft": soft, "objective": objective, "engine": engine}
    options = own if cls is SoftGRPOTrainer else {}
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
        {"top_k": 64, "top_p": 1.0}, "latent_grpo", "dapo", "token", 0.0, ("none", "token")
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
    inputs = trainer._generate_and_score_completions(rows_of(PROMPTS))
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


def rows_of(prompts):
    return [row for row in ROWS[:prompts] for _ in range(SAMPLES)]


def test_discrete_mode_is_trls_own(model_path, tmp_path):
    settings = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "beta": 0.1, "num_iterations": 2}
    ours = make_trainer(model_path, tmp_path, soft=SoftConfig(enabled=False), **settings)
    theirs = make_trainer(model_path, tmp_path, cls=GRPOTrainer, **settings)
    inputs = ours._generate_and_score_completions(rows_of(PROMPTS))
    drawn = [row.samples[0].token_ids for row in inputs["record"]]
    theirs._generate_single_turn = lambda *arguments, **options: (drawn, None)
    expected = theirs._generate_and_score_completions(rows_of(PROMPTS))
    mask = inputs["completion_mask"].bool()
    # What the engine drew with, of all the vocabulary, is what TRL computes.
    drawn_with = inputs["sampling_per_token_logps"][mask]
    torch.testing.assert_close(drawn_with, expected["old_per_token_logps"][mask], rtol=0, atol=1e-4)
    assert not drawn_with.isnan().any()
    inputs["importance_sampling_ratio"].fill_(1.0)  # 1 up to rounding
    losses = []
    for trainer, batch in ((ours, inputs), (theirs, expected)):
        shift(trainer.model, 0.01, seed=1)
        losses.append(trainer._compute_loss(trainer.model, batch))
        losses[-1].backward()
    assert losses[0] == losses[1] != 0
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_another_engine_draws_the_same_samples(model_path, tmp_path):
    """transformers' own, which reads the model from its directory as vLLM does."""
    drawn = []
    for engine in ("native", "hf"):
        trainer = make_trainer(model_path, tmp_path, engine=engine)
        shift(trainer.model, 0.01, seed=1)  # what the directory does not have
        inputs = trainer._generate_and_score_completions(rows_of(PROMPTS))
        drawn.append([row.samples[0].token_ids for row in inputs["record"]])
        (difference,) = trainer._metrics["train"]["sampling/sampling_logp_difference/max"]
        assert difference < 1e-3
    assert drawn[0] == drawn[1]


def test_adapters_reach_the_engine(model_path, tmp_path):
    """Merged for the engine alone: the weights under them keep their bits; the reference is the
    model without them."""
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = make_trainer(
        model_path, tmp_path, peft=adapters, objective="concrete", beta=0.1, num_iterations=2
    )
    weights = {n: p for n, p in trainer.model.named_parameters() if ".lora_" not in n}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3)
    before = {name: parameter.clone() for name, parameter in weights.items()}
    inputs = trainer._generate_and_score_completions(rows_of(PROMPTS))
    (difference,) = trainer._metrics["train"]["sampling/sampling_logp_difference/max"]
    assert difference < 1e-3
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    old, reference = inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
    assert (old - reference).abs().max() > 0.05
    trainer._compute_loss(trainer.model, inputs).backward()
    trained = {n for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in trainer.model.named_parameters() if ".lora_" in n}


def test_samples_have_the_names_of_softgrpo_train(model_path, tmp_path):
    """By the pass that a run is at, so a resumed one goes on with other noise; and the same in
    every evaluation."""
    trainer = make_trainer(
        model_path, tmp_path, gradient_accumulation_steps=4, steps_per_generation=2
    )
    prompts = [[7, 8]] * SAMPLES + [[9]] * SAMPLES

    def names(number):
        return [uid for group in rollout_uids(number, PROMPTS, SAMPLES) for uid in group]

    assert trainer._uids(prompts, SAMPLES) == names(0)
    trainer.state.global_step, trainer._step = 3, 14  # 2 passes into the step
    assert trainer._uids(prompts, SAMPLES) == names(7)
    trainer._step = 2  # as after a resume
    assert trainer._uids(prompts, SAMPLES) == names(7)
    trainer.model.eval()
    first = trainer._uids(prompts, SAMPLES)
    trainer.state.global_step = 5
    assert trainer._uids(prompts, SAMPLES) == first
    assert len(set(first)) == len(first)


@pytest.mark.parametrize(("bf16", "off"), [(False, 1e-3), (True, 0.2)])
def test_a_run_trains_and_evaluates(bf16, off, model_path, tmp_path):
    """All of TRL's loop; the weights of a step reach the rollouts of the next one."""
    trainer = make_trainer(
        model_path, tmp_path, soft=SoftConfig(max_soft_tokens=4, end_of_thinking=2), bf16=bf16
    )
    trainer.eval_dataset = Dataset.from_list(ROWS[:2])
    trainer.args.per_device_eval_batch_size = PROMPTS * SAMPLES
    before = trainer.evaluate()
    assert trainer.evaluate()["eval_reward"] == before["eval_reward"]
    trainer.train()
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(steps) == 2
    for step in steps:
        assert step["grad_norm"] > 0
        assert step["sampling/sampling_logp_difference/max"] < off
    assert trainer.engine.weight_version == 1
    trainer.save_model(str(tmp_path / "saved"))
    assert SoftParams.of_model(tmp_path / "saved").max_soft_tokens == 4


def test_an_evaluation_draws_with_the_weights_of_its_model(model_path, tmp_path):
    """Also with those that came by another way than a step, as the best ones at the end do."""
    trainer = make_trainer(model_path, tmp_path)
    trainer.eval_dataset = Dataset.from_list(ROWS[:2])
    trainer.args.per_device_eval_batch_size = PROMPTS * SAMPLES
    trainer.evaluate()
    shift(trainer.model, 0.05, seed=1)
    trainer.evaluate()
    rows = trainer.state.log_history
    first, second = (row["eval_sampling/sampling_logp_difference/max"] for row in rows)
    assert max(first, second) < 1e-3


def test_an_architecture_is_refused_whoever_draws(tokenizer, tmp_path):
    """Its logits are capped, which the densities would leave out in silence."""
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="architecture 'Gemma2ForCausalLM' is not supported"):
        make_trainer(str(tmp_path / "gemma"), tmp_path, engine="hf")


def test_weights_that_no_engine_reads_are_one_line(model_path, tmp_path):
    peft = pytest.importorskip("peft")
    for model, adapters, said in (
        ("float16", None, "the model is torch.float16: load it in bfloat16 or float32"),
        ("float32", peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "LORA use_dora"),
        ("float32", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
        ("float32", peft.LoraConfig(target_modules=["embed_tokens"]), "the input embeddings have"),
    ):
        settings = {"model_init_kwargs": {"dtype": model}}
        with pytest.raises(ValueError, match=said) as error:
            make_trainer(model_path, tmp_path, peft=adapters, **settings)
        assert "\n" not in str(error.value)
