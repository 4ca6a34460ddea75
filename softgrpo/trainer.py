"""The training loop: rollout, reward, advantage, update, sync."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoTokenizer

from softgrpo.algorithm.advantages import group_advantages, overlong_penalty
from softgrpo.config import Config
from softgrpo.config.rollout import RolloutConfig
from softgrpo.config.schedule import soft_at
from softgrpo.data.training import TrainingData
from softgrpo.distributed import World, patience
from softgrpo.learner.device import check_device, device_type, make_deterministic
from softgrpo.learner.load import load_policies
from softgrpo.learner.lora import merged_tensors
from softgrpo.learner.microbatches import check_budget
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.update import Update, learning_rate
from softgrpo.log.metrics import rollout_metrics
from softgrpo.rewards import RewardFunc, RewardRunner
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.engines import load_engine, make_engine, sleeps
from softgrpo.rollout.sampling import (
    ROLLOUT_STREAM,
    Sampling,
    density_settings,
    rollout_uids,
)
from softgrpo.rollout.scored import ScoredRollout
from softgrpo.run.held_out import evaluation_rollout
from softgrpo.run.interrupt import stop_on_signals
from softgrpo.run.journal import Journal
from softgrpo.run.round import Round, sampled_beside
from softgrpo.run.session import RunState, Session
from softgrpo_engine import SamplingParams
from softgrpo_engine.execution.memory import return_freed_memory
from softgrpo_engine.model.source import resolve_model


class Trainer:
    """SofT-GRPO, in one process or in each of those that torchrun starts.

        Trainer(Config.load("demo"), reward_funcs=[my_reward]).train()

    Everything that can be wrong with the configuration, the data and the rewards is checked before
    the model is loaded. reward_funcs, one or several callables, replace ``reward.functions`` of the
    configuration; reward_weights: 1 each by default. They have TRL's signature ``reward(prompts,
    completions, completion_ids, **columns) -> list[float | None]`` and may be async.
    """

    def __init__(
        self,
        config: Config,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        reward_weights: Sequence[float] | None = None,
    ) -> None:
        check_device(config, device_type())
        if config.run.deterministic:
            make_deterministic()
        self.config = config  # asked anew at every step: a dry run makes its steps smaller
        self.world = World.join(config.run.timeout_s, config.rollout.tensor_parallel)
        self.world.check_shares("rollout.prompts_per_step", config.rollout.prompts_per_step)
        self.journal = Journal(config, self.world)
        load_engine(config.rollout.engine)
        self.data = TrainingData(config)
        self.rewards = RewardRunner(config.reward, reward_funcs, reward_weights)
        model_path = resolve_model(config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(str(model_path))
        prompts = self.data.prepare(tokenizer, self.world)
        check_budget(config, max(map(len, prompts)))
        longest = max(r.max_new_tokens for r in (config.rollout, evaluation_rollout(config)))
        longest_text, samples = max(map(len, prompts)) + longest, self._most_samples()
        self.llm = make_engine(config, model_path, tokenizer, longest_text, samples, self.world)
        self.llm.check_fits(prompts, SamplingParams(max_tokens=longest))
        self.policy, reference = load_policies(config, model_path, self.llm.device, self.world)
        optimizer = make_optimizer(self.policy.decoder, config.optim)
        self.update = Update(self.policy, reference, optimizer, self.world)
        self.state = RunState()
        self._ahead: Round | None = None  # sampled during the update of the step before
        self._lost = 0  # samples without a reward, of all processes, that were told
        self.session = Session(
            self.journal, self.state, self.data, self.rewards, model_path, self.llm, self.update
        )

    def train(self) -> Path:
        """Trains up to ``run.max_steps`` and returns the run folder."""
        session = self.session
        # After an error rewards that have not begun would be computed before the program ends.
        with closing(self.rewards), self.journal.progress, stop_on_signals() as request, patience():
            session.start()
            while not session.is_over:
                if signal := max(self.world.gather(request.signal or 0)):
                    session.end_early(signal)
                row = self.step(self.state.step + 1)
                session.after_step(row)
            session.finish()
        return self.journal.folder.path

    def step(self, step: int) -> dict[str, Any]:
        """One training step (1-based): rollout, reward, advantage, update, sync."""
        config, times = self.config, defaultdict[str, float](float)
        soft = soft_at(config.rollout, step)
        self.update.score_by(density_settings(config, soft))
        drawn = self._sample(replace(config.rollout, soft=soft), times)
        rollout_row = rollout_metrics(drawn, self._batch(drawn), self.policy.settings, config)
        if config.rollout.ahead:
            lag = self.llm.weight_version - mean(drawn.weight_versions)
            rollout_row["sampling/weight_lag"] = lag
        with self._sampling_ahead(step + 1, times), self._timed("train", times):
            if sleeps(config, self.llm.device):
                self.llm.sleep(weights=config.rollout.sleep == "always")
                self._hand_over_memory()
            chosen = drawn.choose(config.rollout.prompts_per_step)
            batch = self._batch(chosen)
            penalty_S = overlong_penalty(
                batch.response_lens, config.rollout.max_new_tokens, config.algorithm.overlong_buffer
            )
            advantages_S = group_advantages(
                chosen.rewards_S + penalty_S, batch.group, config.algorithm.advantage
            )
            lr = learning_rate(config.optim, step, config.run.max_steps)
            update_row, updates = self.update(batch, advantages_S, lr, config)
            # The memory of the gradients is for the KV cache until the next update.
            self.update.optimizer.zero_grad()
        with self._timed("sync", times):
            if sleeps(config, self.llm.device):
                self._hand_over_memory()
            if updates or config.rollout.sleep == "always":
                version = self.llm.weight_version + updates
                self.llm.update_weights(merged_tensors(self.policy.decoder), version=version)
            if sleeps(config, self.llm.device):
                self.llm.wake()
        self.state.step = step
        self.state.num_tokens += drawn.num_tokens
        if self.state.is_due(config.log.samples_every):
            mixture, tokenizer = soft.mixture, self.llm.tokenizer
            self.journal.samples(
                chosen, advantages_S, step=step, phase="train", mixture=mixture, tokenizer=tokenizer
            )
        return {
            "step": step,
            **rollout_row,
            **update_row,
            "learning_rate": lr,
            "num_tokens": self.state.num_tokens,
            "tokens_per_second": drawn.num_tokens / drawn.seconds,
            "step_time": sum(times.values()),
            **times,
        }

    def _hand_over_memory(self) -> None:
        """Until all processes have given back what they had of their GPUs: with tensor parallelism
        an engine takes memory of GPUs that are other processes' too."""
        if self.world.tensor_parallel > 1:
            return_freed_memory(self.llm.device, of_modules=False)
            self.world.wait()

    def _sample(self, rollout: RolloutConfig, times: defaultdict[str, float]) -> ScoredRollout:
        """A round of prompts with rewards; further rounds while too few groups would teach."""
        drawn = self._sample_round(rollout, times)
        for _ in range(self.config.algorithm.dynamic_sampling_rounds):
            if len(drawn.useful_groups) >= self.config.rollout.prompts_per_step:
                break
            drawn += self._sample_round(rollout, times)
        return drawn

    def _sample_round(
        self, rollout: RolloutConfig, times: defaultdict[str, float]
    ) -> ScoredRollout:
        drawn, self._ahead = self._ahead, None
        if drawn is None:
            drawn = self._round(self.state.rounds, rollout)
            with self._timed("rollout", times):
                drawn.sample()
        with self._timed("reward", times):
            drawn.wait()
        with self._timed("gather", times):
            drawn.gather()
        with self._timed("reward", times):
            scored = drawn.scored()
        self.state.rounds += 1
        before, self._lost = self._lost, sum(self.world.gather(self.rewards.lost))
        if lost := self._lost - before:
            self.journal.progress.message(
                f"warning: rewards of {lost} samples hung or crashed: none"
            )
        return scored

    @contextmanager
    def _sampling_ahead(self, step: int, times: defaultdict[str, float]) -> Iterator[None]:
        """With `rollout.ahead` a step is sampled inside, with the engine's weights as they are.

        Not the step after a checkpoint: its samples would be of weights that a resume has not.
        """
        config = self.config
        is_saved = config.checkpoint.every and (step - 1) % config.checkpoint.every == 0
        if not config.rollout.ahead or is_saved or step > config.run.max_steps:
            yield
            return
        rollout = replace(config.rollout, soft=soft_at(config.rollout, step))
        drawn = self._round(self.state.rounds, rollout)
        with sampled_beside(drawn, self.llm.device) as sampling:
            yield
            with self._timed("rollout", times):
                sampling.result()
        self._ahead = drawn

    def _round(self, number: int, rollout: RolloutConfig) -> Round:
        config, prompts = self.config, self.data.prompts_of_round(number, rollout.prompts_per_step)
        return Round(
            self.llm,
            self.rewards,
            self.world,
            prompts,
            rollout_uids(number, len(prompts), rollout.group_size),
            Sampling.of_step(config, rollout),
        )

    def _most_samples(self) -> int:
        """The most samples that this process draws at a time, in steps and in evaluations."""
        rollout, engines = self.config.rollout, self.world.engines
        drawn = math.ceil(rollout.prompts_per_step / engines) * rollout.group_size
        held_out = math.ceil(len(self.data.held_out) / engines) * self.config.eval.samples
        return max(drawn, held_out)

    def _batch(self, rollout: ScoredRollout) -> RolloutBatch:
        return RolloutBatch.from_outputs(
            rollout.outputs,
            seed=self.config.run.seed,
            stream=ROLLOUT_STREAM,
            weight_version=rollout.weight_versions,
        )

    @contextmanager
    def _timed(self, phase: str, times: defaultdict[str, float]) -> Iterator[None]:
        self.journal.progress.phase(phase)
        started = time.perf_counter()
        yield
        times[f"time/{phase}"] += time.perf_counter() - started
