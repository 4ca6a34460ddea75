"""The training loop: rollout, reward, advantage, update, sync."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from softgrpo.algorithm.advantages import group_advantages, overlong_penalty
from softgrpo.config import Config
from softgrpo.data.training import TrainingData
from softgrpo.distributed import World, patience
from softgrpo.learner.device import check_device, device_type
from softgrpo.learner.lora import add_adapters, merged_tensors
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update, learning_rate
from softgrpo.log.health import HealthWatch
from softgrpo.log.metrics import completion_metrics, reward_metrics, soft_metrics
from softgrpo.log.progress import TrainProgress
from softgrpo.log.samples import sample_rows
from softgrpo.log.tracking import Tracking
from softgrpo.report import build_report
from softgrpo.rewards import RewardFunc, RewardRunner
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.engines import RolloutEngine, load_engine
from softgrpo.rollout.sampling import (
    ROLLOUT_STREAM,
    collect,
    density_settings,
    rollout_uids,
    soft_params,
)
from softgrpo.rollout.scored import ScoredRollout
from softgrpo.run.checkpoint import load_checkpoint, load_newest, set_aside
from softgrpo.run.export import export_adapter, export_model
from softgrpo.run.folder import RunFolder, find_checkpoint
from softgrpo.run.held_out import evaluate, evaluation_rollout, evaluation_row
from softgrpo.run.interrupt import Interrupted, stop_on_signals
from softgrpo_engine import SamplingParams
from softgrpo_engine.model.source import resolve_model
from softgrpo_engine.model.weights import load_decoder


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
        self.config = config
        self.world = World.join(config.run.timeout_s)
        self.world.check_shares("rollout.prompts_per_step", config.rollout.prompts_per_step)
        self.folder = RunFolder(Path(config.run.output_dir) / config.run.name, self.world)
        self.checkpoint = find_checkpoint(self.folder, config)
        self.tracking = Tracking(config.log.report_to if self.world.is_first else [])
        engine = load_engine(config.rollout.engine)
        self.data = TrainingData(config)
        self.rewards = RewardRunner(config.reward, reward_funcs, reward_weights)
        self.model_path = resolve_model(config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(str(self.model_path))
        prompts = [prompt.token_ids for prompt in self.data.prepare(tokenizer)]
        longest = max(r.max_new_tokens for r in (config.rollout, evaluation_rollout(config)))
        self.llm: RolloutEngine = engine(
            self.model_path,
            tokenizer=tokenizer,
            dtype=config.model.dtype,
            # No longer than this run needs: the size of the KV cache, and with it the schedule,
            # then does not depend on how much memory happens to be free.
            max_model_len=max(map(len, prompts)) + longest,
            kv_memory=config.rollout.kv_memory,
            max_batch_size=config.rollout.max_batch_size,
            max_batch_tokens=config.rollout.max_batch_tokens,
        )
        self.llm.check_fits(prompts, SamplingParams(max_tokens=longest))
        self.policy, self.update = self._make_policy()
        self.progress = TrainProgress(None if self.world.is_first else Console(quiet=True))
        self.health = HealthWatch(config.health.window)
        self.done_steps = 0
        self.rounds = 0  # of prompts, drawn so far; more than steps with dynamic sampling
        self.num_tokens = 0

    def train(self) -> Path:
        """Trains up to ``run.max_steps`` and returns the run folder."""
        config = self.config
        with self.progress, stop_on_signals() as request, patience():
            self._start()
            self.progress.start(config.run.max_steps, self.done_steps, config.run.name)
            while self.done_steps < config.run.max_steps and not self._has_given_up:
                if signal := max(self.world.gather(request.signal or 0)):
                    self._end_early(signal)
                row = self.step(self.done_steps + 1)
                self._record(row)
                self.progress.step(row)
                for warning in self.health.observe(row):
                    self.progress.message(f"warning: {warning.text}")
                if self._due(config.eval.every):
                    self._evaluate()
                if self._due(config.checkpoint.every):
                    self._save_checkpoint()
                    self._build_report()
            self._finish()
        return self.folder.path

    def step(self, step: int) -> dict[str, Any]:
        """One training step (1-based): rollout, reward, advantage, update, sync."""
        config, times = self.config, defaultdict[str, float](float)
        drawn = self._sample(times)
        rollout_metrics = self._rollout_metrics(drawn)
        with self._timed("train", times):
            chosen = drawn.choose(config.rollout.prompts_per_step)
            batch = self._batch(chosen)
            advantages_S = group_advantages(
                chosen.rewards_S + self._overlong_penalty(batch),
                batch.group,
                config.algorithm.advantage,
            )
            lr = learning_rate(config.optim, step, config.run.max_steps)
            update_metrics, updates = self.update(batch, advantages_S, lr)
        with self._timed("sync", times):
            if updates:
                self._sync(self.llm.weight_version + updates)
        self.done_steps = step
        self.num_tokens += drawn.num_tokens
        self._show_samples(chosen, advantages_S)
        return {
            "step": step,
            **rollout_metrics,
            **update_metrics,
            "learning_rate": lr,
            "num_tokens": self.num_tokens,
            "tokens_per_second": drawn.num_tokens / times["time/rollout"],
            "step_time": sum(times.values()),
            **times,
        }

    def _sample(self, times: defaultdict[str, float]) -> ScoredRollout:
        """A round of prompts with rewards; further rounds while too few groups would teach."""
        drawn = self._sample_round(times)
        for _ in range(self.config.algorithm.dynamic_sampling_rounds):
            if len(drawn.useful_groups) >= self.config.rollout.prompts_per_step:
                break
            drawn += self._sample_round(times)
        return drawn

    def _sample_round(self, times: defaultdict[str, float]) -> ScoredRollout:
        config = self.config
        with self._timed("rollout", times):
            everyones = self.data.prompts_of_round(self.rounds)
            uids = rollout_uids(self.rounds, len(everyones), config.rollout.group_size)
            prompts = self.world.share(everyones)
            outputs = collect(
                self.llm,
                [prompt.token_ids for prompt in prompts],
                self.world.share(uids),
                config.rollout,
                config.algorithm.objective,
                seed=config.run.seed,
                stream=ROLLOUT_STREAM,
            )
            self.rounds += 1
        with self._timed("reward", times):
            lost = self.rewards.lost
            rewards_S, by_function = self.rewards.score(prompts, outputs)
        with self._timed("gather", times):
            lost = sum(self.world.gather(self.rewards.lost - lost))
            drawn = ScoredRollout(prompts, outputs, rewards_S, by_function).gathered(self.world)
        if lost:
            self.progress.message(f"warning: rewards of {lost} samples hung or crashed: none")
        return drawn

    def _batch(self, rollout: ScoredRollout) -> RolloutBatch:
        return RolloutBatch.from_outputs(
            rollout.outputs,
            seed=self.config.run.seed,
            stream=ROLLOUT_STREAM,
            weight_version=self.llm.weight_version,
        )

    def _overlong_penalty(self, batch: RolloutBatch) -> Tensor:
        config = self.config
        return overlong_penalty(
            batch.response_lens, config.rollout.max_new_tokens, config.algorithm.overlong_buffer
        )

    def _rollout_metrics(self, drawn: ScoredRollout) -> dict[str, float]:
        """Of everything that was drawn: what a refill leaves out counts too."""
        batch, algorithm = self._batch(drawn), self.config.algorithm
        by_function = drawn.by_function
        if algorithm.overlong_buffer:
            by_function = {**by_function, "overlong_penalty": self._overlong_penalty(batch)}
        row = {
            **reward_metrics(drawn.rewards_S, by_function, batch.group),
            **completion_metrics(batch),
            **soft_metrics(batch, self.policy.settings),
        }
        if algorithm.dynamic_sampling_rounds:
            row["dynamic_sampling/groups"] = float(len(drawn.outputs))
            row["dynamic_sampling/useful_groups"] = float(len(drawn.useful_groups))
        return row

    def _sync(self, version: int) -> None:
        """Hands the weights to the engine, one parameter at a time."""
        self.llm.update_weights(merged_tensors(self.policy.decoder), version=version)

    def _make_policy(self) -> tuple[Policy, Update]:
        """The trainable policy with float32 master weights, and its update; with adapters these
        are float32, and the frozen weights have the dtype of the computation."""
        config = self.config
        settings = density_settings(config)
        dtype = getattr(torch, config.model.dtype)
        master = dtype if config.lora.rank else torch.float32
        decoder = load_decoder(self.model_path, master, self.llm.device)
        decoder.gradient_checkpointing = config.optim.gradient_checkpointing
        reference = None
        if config.algorithm.kl_coef > 0:
            frozen = copy.deepcopy(decoder).to(dtype).requires_grad_(False)
            reference = Policy(frozen, settings, dtype)
            self.world.shard(reference, frozen.model.layers, dtype)
        if config.lora.rank:
            add_adapters(decoder, config.lora, config.run.seed)
        policy = Policy(decoder, settings, dtype)
        # With adapters the frozen weights are in that dtype already, and the adapters stay float32.
        self.world.shard(policy, decoder.model.layers, None if config.lora.rank else dtype)
        most = config.rollout.max_new_tokens
        update = Update(policy, reference, config.algorithm, config.optim, most, self.world)
        return policy, update

    def _start(self) -> None:
        """Continues from the checkpoint found, or begins a new run folder."""
        config = self.config
        self.folder.create(config.to_yaml())
        if self.checkpoint is not None:
            newest = [self.checkpoint]
            if config.run.resume == "auto":
                newest = [self.folder.checkpoint(s) for s in self.folder.checkpoint_steps()[::-1]]
            say, model = self.progress.message, self.policy.decoder
            self.checkpoint, damaged, state = load_newest(newest, model, self.update.optimizer, say)
            if self.world.is_first:
                set_aside(damaged)
            self.done_steps, self.num_tokens = state["step"], state["num_tokens"]
            self.rounds = state["rounds"]
            self._sync(state["weight_version"])
            self.progress.message(f"continuing after step {self.done_steps}: {self.checkpoint}")
        if self.data.too_long:
            limit = f"longer than {config.data.max_prompt_tokens} tokens"
            self.progress.message(f"left out {self.data.too_long} training prompts {limit}")
        self.folder.truncate_after(self.done_steps if self.checkpoint else -1)
        for row in self.folder.step_rows():
            self.health.observe(row)
        self.tracking.start(self.folder.path, config.run.name, asdict(config), self.done_steps + 1)
        if self.checkpoint is None and config.eval.before_train and self.data.held_out:
            self._evaluate()

    def _finish(self) -> None:
        """The last checkpoint, the held-out result, the exported model and the report."""
        config = self.config
        if self.folder.latest_step() != self.done_steps:
            self._save_checkpoint()
        if self._has_given_up:
            self._return_to_best()
        wanted = config.eval.after_train and bool(self.data.held_out)
        if wanted and not self.folder.has_evaluation(self.done_steps):
            self._evaluate()
        if config.lora.rank:
            export_adapter(
                self.policy.decoder,
                config.model.path,
                self.folder.path / "adapter",
                write=self.world.is_first,
            )
        if config.checkpoint.export_hf:
            export_model(
                merged_tensors(self.policy.decoder),
                self.model_path,
                self.folder.model,
                soft_params(config.rollout, config.algorithm.objective),
                self.world,
            )
        self._close()

    def _end_early(self, signal_number: int) -> None:
        """Saves what there is and raises Interrupted."""
        if self.folder.latest_step() != self.done_steps:
            self._save_checkpoint()
        self._close()
        raise Interrupted(signal_number, self.done_steps, self.config.run.max_steps)

    def _build_report(self) -> None:
        if self.world.is_first:
            build_report(self.folder.path)

    def _close(self) -> None:
        self._build_report()
        self.tracking.close()
        self.rewards.close()
        self.world.leave()

    def _record(self, row: dict[str, Any]) -> None:
        self.folder.append_metrics(row)
        self.tracking.log(row)

    @property
    def _has_given_up(self) -> bool:
        return self.config.health.stop and self.health.collapsed

    def _return_to_best(self) -> None:
        """Takes the weights of the best checkpoint for what follows the last step."""
        best = self.health.best(self.folder.checkpoint_steps())
        state = load_checkpoint(
            self.folder.checkpoint(best), self.policy.decoder, self.update.optimizer
        )
        self._sync(state["weight_version"])
        self.progress.message(
            f"stopped after step {self.done_steps} (health.stop); the model is that of step {best}"
        )
        self.done_steps = best
        self._record({"step": best, "summary/model_of_step": best})

    def _due(self, every: int) -> bool:
        return every > 0 and self.done_steps % every == 0

    def _save_checkpoint(self) -> None:
        state = {
            "rounds": self.rounds,
            "num_tokens": self.num_tokens,
            "weight_version": self.llm.weight_version,
        }
        best = None
        if self.config.health.stop:
            best = self.health.best([*self.folder.checkpoint_steps(), self.done_steps])
        self.folder.save_checkpoint(
            self.done_steps,
            self.policy.decoder,
            self.update.optimizer,
            state,
            self.config.checkpoint.keep,
            best,
        )

    def _evaluate(self) -> None:
        self.progress.phase("eval")
        everyones = self.data.eval_prompts()
        outputs = evaluate(self.llm, [p.token_ids for p in everyones], self.config, self.world)
        prompts = self.world.share(everyones)
        scored = ScoredRollout(prompts, outputs, *self.rewards.score(prompts, outputs))
        scored, ks = scored.gathered(self.world), self.config.eval.k
        row = evaluation_row(self.done_steps, scored.outputs, scored.rewards_S, ks)
        self._record(row)
        self.progress.evaluation(row)
        self._keep_samples("eval", scored, None)

    def _show_samples(self, chosen: ScoredRollout, advantages_S: Tensor) -> None:
        if self._due(self.config.log.samples_every):
            for row in self._keep_samples("train", chosen, advantages_S):
                self.progress.sample(row)

    def _keep_samples(
        self, phase: str, scored: ScoredRollout, advantages_S: Tensor | None
    ) -> list[dict[str, Any]]:
        config = self.config
        rows = sample_rows(
            scored,
            advantages_S,
            config.log.samples_per_step,
            step=self.done_steps,
            phase=phase,
            tau=(evaluation_rollout(config) if phase == "eval" else config.rollout).soft.tau,
            tokenizer=self.llm.tokenizer,
        )
        self.folder.append_samples(rows)
        return rows

    @contextmanager
    def _timed(self, phase: str, times: defaultdict[str, float]) -> Iterator[None]:
        self.progress.phase(phase)
        started = time.perf_counter()
        yield
        times[f"time/{phase}"] += time.perf_counter() - started
