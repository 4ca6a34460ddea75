"""Settings that are each allowed but do not go together."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from softgrpo.config.engines import find_engine
from softgrpo.config.rollout import RolloutConfig
from softgrpo.config.schedule import soft_at
from softgrpo.config.schema import ConfigError
from softgrpo.config.sections import AdamWConfig, Sections

if TYPE_CHECKING:
    from softgrpo_kernels.methods.method import Method


def check(config: Sections) -> None:
    """Raises ConfigError, one line that names the keys and the remedy, for a wrong pairing."""
    check_name(config.run.name)
    if not config.data.train:
        raise ConfigError(
            "data.train is not set: name a dataset, such as reasoning_gym:chain_sum, "
            "train.jsonl or openai/gsm8k"
        )
    if not config.reward.functions:
        raise ConfigError("reward.functions is empty: name at least one reward function")
    _check_method(config)
    _check_thoughts(config)
    _check_algorithm(config)
    find_engine(config.rollout.engine)
    if config.lora.rank and find_spec("peft") is None:
        raise ConfigError("lora.rank: adapters need: pip install 'softgrpo[peft]'")
    if config.lora.rank and not config.lora.target_modules:
        raise ConfigError("lora.target_modules is empty: name at least one, such as q_proj")
    check_optim(config.optim)
    if not config.eval.k or max(config.eval.k) > config.eval.samples:
        raise ConfigError(
            f"eval.k: {config.eval.k} is not allowed: each k must be <= eval.samples "
            f"({config.eval.samples})"
        )
    if config.eval.every and config.data.eval is None:
        raise ConfigError("eval.every is set, but data.eval names no dataset")
    if 0 < config.health.window < 10 or (config.health.stop and not config.health.window):
        raise ConfigError(
            f"health.window: {config.health.window} is not allowed: a trend needs >= 10 steps; "
            "0, without health.stop, switches the watch off"
        )
    if config.health.stop and not config.checkpoint.every:
        raise ConfigError(
            "health.stop: there is no checkpoint to go back to; set checkpoint.every above 0"
        )


def check_name(name: str) -> None:
    """A run stays in its folder of run.output_dir."""
    if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        raise ConfigError(
            f"run.name: {name!r} is not allowed: must be the name of one folder, which is made in "
            "run.output_dir"
        )


def check_optim(optim: AdamWConfig) -> None:
    """There is such an optimizer, and its moments are means."""
    if optim.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError("optim.name: adamw_8bit needs: pip install bitsandbytes")
    if max(optim.betas) >= 1:
        raise ConfigError(f"optim.betas: {list(optim.betas)} is not allowed: must be < 1")


def _check_method(config: Sections) -> None:
    """There is such a method, it has a density, and what it needs of the other settings holds."""
    # Imported here: PyTorch comes with it, which takes seconds, and all keys have been read.
    from softgrpo_kernels.methods import OBJECTIVES, SOFT_NOISES, method_of, objectives_of

    soft, objective = config.rollout.soft, config.algorithm.objective
    for key, value, names in (
        ("rollout.soft.noise", soft.noise, SOFT_NOISES),
        ("algorithm.objective", objective, OBJECTIVES),
    ):
        if value not in names:
            raise ConfigError(f"{key}: {value!r} is not allowed: must be one of {', '.join(names)}")
    if not soft.enabled:
        return
    known = objectives_of(soft.noise)
    if not known:
        why = method_of(soft.noise).why_untrained
        raise ConfigError(f"rollout.soft.noise: {soft.noise!r} cannot be trained: {why}")
    if objective not in known:
        raise ConfigError(
            f"algorithm.objective: {objective!r} is no density of rollout.soft.noise "
            f"{soft.noise!r}, which needs objective {' or '.join(known)}"
        )
    method = method_of(soft.noise, objective)
    if soft.noise_clip is not None:
        instead = "is the density of unclipped noise (the released models used 'official')"
        if method.noise_clip is not None:
            low, high = method.noise_clip
            instead = f"sets the clip [{low:g}, {high:g}] itself"
        raise ConfigError(
            f"rollout.soft.noise_clip: leave it null: algorithm.objective {objective!r} {instead}"
        )
    if method.draws_weights and soft.tau != 1.0:
        raise ConfigError(
            f"rollout.soft.tau: noise {soft.noise!r} draws the weights themselves; set tau=1"
        )
    if method.refuses_scale(soft.noise_scale):
        raise ConfigError(f"rollout.soft.noise_scale: {method.scale_rule}")
    if method.why_no_floor and soft.weight_floor:
        raise ConfigError(
            f"rollout.soft.weight_floor: noise {soft.noise!r} has none, as {method.why_no_floor}; "
            "set weight_floor=0"
        )
    _check_schedule(config.rollout, method)
    if method.needs_floor and not soft.weight_floor:
        raise ConfigError(
            f"algorithm.objective: {objective!r} is the density of a mixture with a weight floor: "
            "set rollout.soft.weight_floor, such as 0.1 (without one it would be 'concrete')"
        )
    if method.per_slot and config.algorithm.ratio_level == "sequence":
        raise ConfigError(
            f"algorithm.ratio_level: objective {objective!r} has a ratio of every drawn slot, not "
            "one a sample; set ratio_level=token"
        )
    algorithm = config.algorithm
    if method.heavy_tailed and algorithm.kl_coef and algorithm.kl_estimator == "k3":
        raise ConfigError(
            f"algorithm.kl_estimator: k3 has an infinite variance under objective {objective!r} of "
            f"{soft.noise!r} noise once the policy doubles a candidate's probability: set "
            "kl_estimator=k2 (or auto)"
        )
    corrected = algorithm.correction.mode != "none"
    if not method.records_density and (corrected or config.rollout.ahead):
        what = f"{soft.noise!r} noise" if not method.keeps_logp else f"objective {objective!r}"
        key, remedy = ("algorithm.correction.mode", "mode=none")
        if config.rollout.ahead:
            key, remedy = ("rollout.ahead", "ahead=0: it needs algorithm.correction")
        raise ConfigError(
            f"{key}: the record of {what} does not give the rollout's probabilities back, so its "
            f"density is not known; set {remedy}"
        )


def _check_schedule(rollout: RolloutConfig, method: Method) -> None:
    schedule = rollout.schedule
    if not schedule.steps:
        return
    if schedule.steps == 1 or not schedule.starts:
        raise ConfigError(
            "rollout.schedule: nothing would change: set steps above 1 and a start value (tau, "
            "temperature, noise_scale or weight_floor), or steps=0"
        )
    if method.draws_weights and schedule.tau is not None:
        raise ConfigError(
            f"rollout.schedule.tau: noise {rollout.soft.noise!r} draws the weights themselves, "
            "with tau 1; leave it null"
        )
    if method.why_no_floor and schedule.weight_floor:
        raise ConfigError(
            f"rollout.schedule.weight_floor: noise {rollout.soft.noise!r} has none, as "
            f"{method.why_no_floor}; leave it null"
        )
    for step in range(1, schedule.steps):
        scale = soft_at(rollout, step).noise_scale
        if method.refuses_scale(scale):
            raise ConfigError(
                f"rollout.schedule.noise_scale: {scale:g} at step {step}: {method.scale_rule}"
            )


def _check_thoughts(config: Sections) -> None:
    """So many thoughts as a response must have, it can have; and they are of one kind."""
    rollout, soft = config.rollout, config.rollout.soft
    if soft.enabled and rollout.filler_thoughts.count:
        raise ConfigError(
            "rollout.filler_thoughts: they take the place of soft thoughts, a discrete answer "
            "follows; set rollout.soft.enabled=false"
        )
    for name, most in (
        ("rollout.soft.max_soft_tokens", soft.max_soft_tokens),
        ("rollout.max_new_tokens", rollout.max_new_tokens),
        ("eval.max_new_tokens", config.eval.max_new_tokens),
    ):
        if soft.enabled and most is not None and soft.min_soft_tokens > most:
            raise ConfigError(
                f"rollout.soft.min_soft_tokens: {soft.min_soft_tokens} is more than {name} "
                f"({most}): lower it, or raise that"
            )


def _check_algorithm(config: Sections) -> None:
    algorithm = config.algorithm
    if config.rollout.ahead and algorithm.correction.mode == "none":
        raise ConfigError(
            "rollout.ahead: samples of older weights need importance weights: set "
            "algorithm.correction.mode=truncate (or mask), or ahead=0"
        )
    if config.rollout.ahead and config.rollout.sleep == "always":
        raise ConfigError(
            "rollout.sleep: the engine cannot sleep during the update while it draws the next step "
            "(rollout.ahead): set sleep=auto, or ahead=0"
        )
    if algorithm.ratio_level == "sequence" and algorithm.loss_aggregation != "sequence":
        raise ConfigError(
            "algorithm.ratio_level: one ratio a sample (GSPO) goes with one loss a sample: set "
            "algorithm.loss_aggregation=sequence"
        )
    if algorithm.overlong_buffer > config.rollout.max_new_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer: {algorithm.overlong_buffer} is more than "
            f"rollout.max_new_tokens ({config.rollout.max_new_tokens})"
        )
