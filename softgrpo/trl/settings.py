"""What a GRPOConfig says to our engine and to our densities, and what of it cannot hold."""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig

from softgrpo.config import Config, ConfigError
from softgrpo.config.rollout import RolloutConfig, SoftConfig
from softgrpo.config.sections import AlgorithmConfig, DataConfig, DistributedRunConfig
from softgrpo.rollout.sampling import soft_params
from softgrpo_kernels.methods import method_of, objectives_of

# A setting of GRPOConfig, the one value of it that holds here, and why.
_ONLY = (
    ("use_vllm", False, "rollouts come from the engine of this trainer"),
    (
        "use_transformers_continuous_batching",
        False,
        "rollouts come from the engine of this trainer",
    ),
    ("generation_kwargs", None, "the engine of this trainer knows none"),
    ("repetition_penalty", 1.0, "the densities do not know it"),
    ("min_p", None, "the densities do not know it"),
    ("fp16", False, "the engine has bfloat16 (bf16=True) and float32"),
    ("use_liger_kernel", False, "it patches the model that records are scored with"),
    ("cast_lm_head_to_fp32", False, "the sums of candidates' logits are float32 in any case"),
)
_ONLY_IF_SOFT = (
    ("entropy_coef", 0.0, "the entropy of candidates is reported, and has no gradient"),
    ("use_adaptive_entropy", False, "the entropy of candidates is reported, and has no gradient"),
)
# Arguments of GRPOTrainer for positions that no record describes, or weights that no engine reads.
_ABSENT = ("tools", "rollout_func", "environment_factory", "quantization_config")


def check_arguments(args: GRPOConfig, options: dict[str, Any], soft: SoftConfig) -> None:
    """Raises ValueError, one line that names the setting and the remedy.

    options: the other keyword arguments of the trainer.
    """
    for name, allowed, why in _ONLY + (_ONLY_IF_SOFT if soft.enabled else ()):
        value = getattr(args, name)
        if value != allowed:
            raise ValueError(f"{name}={value!r} is not allowed here: {why}; set {name}={allowed}")
    for name in _ABSENT:
        if options.get(name) is not None:
            raise ValueError(f"{name} is not allowed here: SoftGRPOTrainer has none; leave it out")


def config_of(args: GRPOConfig, soft: SoftConfig, objective: str, engine: str) -> Config:
    """The same run in our own configuration. Raises ValueError for what does not go together.

    Discrete rollouts are scored as TRL scores them, over the whole vocabulary.
    """
    config = Config(
        run=DistributedRunConfig(seed=args.seed),
        data=DataConfig(train="TRL's dataset"),
        rollout=RolloutConfig(
            engine=engine,
            prompts_per_step=args.generation_batch_size // args.num_generations,
            group_size=args.num_generations,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            soft=soft,
        ),
        algorithm=AlgorithmConfig(
            objective=objective, discrete_logprob="auto" if soft.enabled else "full"
        ),
    )
    soft_params(config.rollout, objective)  # it knows the ranges
    if soft.enabled:
        _check_ratio_and_kl(args, soft, objective)
    return config


def _check_ratio_and_kl(args: GRPOConfig, soft: SoftConfig, objective: str) -> None:
    method = method_of(soft.noise, objective)
    others = [o for o in objectives_of(soft.noise) if o != objective]
    if method.per_slot:
        raise ConfigError(
            f"objective={objective!r} has a ratio of every drawn slot, and TRL one of a position: "
            f"take another ({', '.join(others)})"
        )
    if method.heavy_tailed and args.beta:
        raise ConfigError(
            f"beta={args.beta:g}: TRL's estimate of the KL (k3) has an infinite variance under "
            f"objective {objective!r}: set beta=0, or another objective ({', '.join(others)})"
        )
