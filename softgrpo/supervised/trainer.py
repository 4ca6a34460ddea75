"""The supervised training loop: a batch of traces, its loss, an optimizer step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from softgrpo.config import ConfigError, SupervisedConfig
from softgrpo.data.sources import read_rows
from softgrpo.data.training import round_indices
from softgrpo.distributed import World
from softgrpo.learner.device import check_device, device_type, make_deterministic
from softgrpo.learner.microbatches import balanced
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.update import learning_rate
from softgrpo.run.checkpoint import load_newest, set_aside
from softgrpo.run.export import export_model
from softgrpo.run.folder import RunFolder, find_checkpoint
from softgrpo.run.interrupt import Interrupted, stop_on_signals
from softgrpo.supervised.loss import PackedTraces, cross_entropy
from softgrpo.supervised.model import master_weights
from softgrpo.supervised.progress import SupervisedProgress
from softgrpo.supervised.traces import Trace, load_traces
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.source import resolve_model


class SupervisedTrainer:
    """Supervised training in one process.

        SupervisedTrainer(SupervisedConfig.load("sft.yaml")).train()

    Everything that can be wrong with the configuration and the data is checked before the weights
    are loaded; a ConfigError or DataError is one line. step: how many are done.
    """

    def __init__(self, config: SupervisedConfig) -> None:
        check_device(config, device_type())
        if config.run.deterministic:
            make_deterministic()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("softgrpo-sft runs in one process: start it without torchrun")
        self.config = config
        self.folder = RunFolder(Path(config.run.output_dir) / config.run.name)
        self.checkpoint = find_checkpoint(self.folder, config)
        rows = list(read_rows(config.data.train))
        self.model_path = resolve_model(config.model.path, weights=not config.model.from_scratch)
        self.traces = load_traces(
            rows,
            config.data.train,
            config.data,
            AutoTokenizer.from_pretrained(str(self.model_path)),
            DecoderConfig.from_pretrained(self.model_path),
        )
        self.decoder = master_weights(
            self.model_path,
            config.model.from_scratch,
            config.run.seed,
            torch.device(device_type()),
        )
        self.decoder.gradient_checkpointing = config.optim.gradient_checkpointing
        self.optimizer = make_optimizer(self.decoder, config.optim)
        self.progress = SupervisedProgress()
        self.step = self.num_tokens = 0

    def train(self) -> Path:
        """Trains up to `run.max_steps`, saves and exports; returns the run's folder."""
        run, checkpoint = self.config.run, self.config.checkpoint
        with self.progress, stop_on_signals() as request:
            self._start()
            while self.step < run.max_steps:
                if request.signal is not None:
                    self._save_if_new()
                    raise Interrupted(request.signal, self.step, run.max_steps)
                row = self.train_step()
                self.folder.append_metrics(row)
                self.progress.step(row)
                if checkpoint.every and self.step % checkpoint.every == 0:
                    self._save_if_new()
            self._save_if_new()
            if checkpoint.export_hf:
                weights = self.decoder.named_parameters()
                export_model(weights, self.model_path, self.folder.model, None, World())
        return self.folder.path

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the next `data.batch_size` rows; returns its row of metrics."""
        started = time.perf_counter()
        config = self.config
        size, seed = config.data.batch_size, config.run.seed if config.data.shuffle else None
        batch = [self.traces[i] for i in round_indices(len(self.traces), self.step, size, seed)]
        self.step += 1
        lr = learning_rate(config.optim, self.step, config.run.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        row = self._backward(batch)
        norm = self._update()
        seconds, tokens = time.perf_counter() - started, sum(map(len, batch))
        self.num_tokens += tokens
        return {
            "step": self.step,
            **row,
            "grad_norm": norm,
            "learning_rate": lr,
            "epoch": self.step * size / len(self.traces),
            "num_tokens": self.num_tokens,
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _backward(self, batch: Sequence[Trace]) -> dict[str, float]:
        """Adds the gradient of the mean loss of the trained positions, which are counted over the
        whole batch, however it is cut into passes."""
        dtype = getattr(torch, self.config.model.dtype)
        trained = sum(int(trace.trained.sum()) for trace in batch)
        lens = [len(trace) for trace in batch]
        entropy, tokens, sums = 0.0, 0, []
        for part in balanced(lens, self.config.optim.tokens_per_microbatch, 1):
            packed = PackedTraces.of([batch[i] for i in part])
            loss_P, right = cross_entropy(self.decoder, packed, dtype)
            loss = loss_P.sum() / trained
            loss.backward()
            entropy += packed.entropy / trained
            tokens += len(packed.tokens)
            sums.append(torch.stack((loss.detach().double(), right.double())))
        loss_sum, right_sum = torch.stack(sums).sum(0).tolist()
        row = {"loss": loss_sum, "target_entropy": entropy}
        return {**row, "accuracy": right_sum / tokens} if tokens else row

    def _update(self) -> float:
        """The optimizer's step; returns the norm of the gradient before it is clipped."""
        parameters = self.decoder.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.grad_clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of step {self.step} is {norm}; lower optim.lr"
            )
        self.optimizer.step()
        return norm

    def _start(self) -> None:
        """Continues from the checkpoint found, or begins a new run's folder."""
        folder, run = self.folder, self.config.run
        folder.create(self.config.to_yaml())
        if self.checkpoint is not None:
            paths = [self.checkpoint]
            if run.resume == "auto":
                paths = [folder.checkpoint(step) for step in folder.checkpoint_steps()[::-1]]
            path, damaged, saved = load_newest(
                paths, self.decoder, self.optimizer, self.progress.message
            )
            set_aside(damaged)
            self.step, self.num_tokens = saved["step"], saved["num_tokens"]
            self.progress.message(f"continuing after step {self.step}: {path}")
        folder.truncate_after(self.step if self.checkpoint is not None else -1)
        self.progress.start(run.name, self.step, run.max_steps)

    def _save_if_new(self) -> None:
        folder = self.folder
        if folder.latest_step() != self.step:
            state, keep = {"num_tokens": self.num_tokens}, self.config.checkpoint.keep
            folder.save_checkpoint(self.step, self.decoder, self.optimizer, state, keep)
