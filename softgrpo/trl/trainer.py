"""TRL's GRPOTrainer, with rollouts of our engine and densities of their records."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context

from softgrpo.algorithm.density import behaviour_densities, rollout_logq
from softgrpo.config.rollout import SoftConfig
from softgrpo.learner.scoring import with_mixtures
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.engines import RolloutEngine, load_engine
from softgrpo.rollout.sampling import (
    EVALUATION_STREAM,
    ROLLOUT_STREAM,
    Sampling,
    collect,
    density_settings,
    soft_params,
)
from softgrpo.run.export import SOFT_SETTINGS_FILE
from softgrpo.trl.padded import PaddedRecord, add_soft_forward
from softgrpo.trl.settings import check_arguments, config_of
from softgrpo.trl.weights import base_model, check_trainable, merged_weights
from softgrpo_engine import LLM, Output
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.source import resolve_model
from softgrpo_engine.model.weights import empty_decoder
from softgrpo_engine.requests.prompts import default_uids
from softgrpo_engine.transfer import on_device


class SoftGRPOTrainer(GRPOTrainer):
    """GRPOTrainer of TRL 1.16 that samples soft thoughts and scores them.

        SoftGRPOTrainer(model, reward, GRPOConfig(...), dataset, soft=SoftConfig(tau=0.1)).train()

    Takes GRPOTrainer's arguments, and as a model also an alias of ours. Rewards, callbacks, logs,
    checkpoints and losses are TRL's, on log-densities in the place of log-probabilities. Further:

    soft: how soft positions are drawn; `SoftConfig(enabled=False)` is TRL's own GRPO on rollouts of
    our engine. `temperature`, `top_p` and `top_k` of GRPOConfig are those of discrete positions.
    objective: density of a soft position (`algorithm.objective`).
    engine: `native`, or another of `rollout.engine`, which reads the model from its directory.

    `vllm_importance_sampling_*` of GRPOConfig correct for this engine as for vLLM: by default they
    do, by one forward pass more. `vllm_max_model_length` is its context.
    Raises ValueError, one line, for settings that cannot hold.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        soft: SoftConfig | None = None,
        objective: str = "exact",
        engine: str = "native",
        **options: Any,
    ) -> None:
        soft, probe = soft or SoftConfig(), args or GRPOConfig()
        check_arguments(probe, options, soft)
        self._run = config_of(probe, soft, objective, engine)
        make_engine = load_engine(engine)
        if isinstance(model, str):
            model = str(resolve_model(model))
        super().__init__(model, reward_funcs, args, *others, **options)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "the weights are sharded (DeepSpeed or FSDP), which is not served here: give each "
                "process the whole model, or train with softgrpo-train"
            )
        whole = self.accelerator.unwrap_model(self.model)
        check_trainable(whole)
        self.settings = density_settings(self._run)
        dtype = torch.bfloat16 if self.args.bf16 else whole.dtype
        for scored in (whole, self.ref_model):
            if scored is not None:
                add_soft_forward(
                    base_model(self.accelerator.unwrap_model(scored)), self.settings, dtype
                )
        self._dtype = dtype
        self.engine = self._make_engine(make_engine, whole)
        # TRL's correction for rollouts of another program: what remains of use_vllm in its methods.
        self.use_vllm = True
        self._synced_at = -1  # the step whose weights the engine has, -1: it must get them
        # Of the pass at hand: a record a row, and which rows earned an advantage above 0.
        self._rows: list[Output] = []
        self._rewarded: Tensor | None = None

    def _make_engine(self, make: Any, model: Any) -> RolloutEngine:
        samples = self.args.generation_batch_size // self.accelerator.num_processes
        options = {
            "tokenizer": self._tokenizer,
            "max_model_len": self.args.vllm_max_model_length,
            "max_batch_size": max(samples, self.args.per_device_eval_batch_size),
        }
        if make is LLM:
            config = DecoderConfig.from_hf(base_model(model).config, tuple(self.eos_token_ids))
            decoder = empty_decoder(config, self._dtype, self.accelerator.device)
            return LLM(decoder, **options)
        name = str(self._dtype).removeprefix("torch.")
        return make(base_model(model).name_or_path, dtype=name, **options)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """A step number of another run says nothing of the weights."""
        self._synced_at = -1
        return super().train(*arguments, **options)

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """The weights may be others than those of the last rollout at the same step: the best ones
        that were loaded at the end, or what the caller put there."""
        self._synced_at = -1
        return super().evaluation_loop(*arguments, **options)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Completions of this process's prompts, and what the rollout drew each token with: its
        log-density, NaN where the record does not give it (which TRL then leaves out)."""
        if images is not None or multimodal_fields:
            raise ValueError("images are not served here: SoftGRPOTrainer trains on text alone")
        with profiling_context(self, "sync_weights"):
            self._sync_weights()
        with profiling_context(self, "softgrpo.generate"):
            self.engine.wake()
            outputs = self._sample(prompt_ids, num_generations)
            self.engine.sleep(weights=False)  # the memory of its KV cache is for the update
        self._rows = [Output(o.prompt_token_ids, [sample]) for o in outputs for sample in o.samples]
        self._rewarded = None
        completions = [row.samples[0].token_ids for row in self._rows]
        return completions, self._behaviour(list(map(len, completions)))

    def _sync_weights(self) -> None:
        if self._synced_at != self.state.global_step:
            model = self.accelerator.unwrap_model(self.model)
            self.engine.update_weights(merged_weights(model), version=self.state.global_step)
            self._synced_at = self.state.global_step

    def _sample(self, prompt_ids: list[list[int]], num_generations: int) -> list[Output]:
        """A prompt comes as many times as it has samples here; the engine computes it once."""
        sampling = Sampling.of_step(self._run, self._run.rollout)
        if not self.model.training:
            sampling = replace(sampling, stream=EVALUATION_STREAM)
        uids = iter(self._uids(prompt_ids, num_generations))
        groups = [(ids, [next(uids) for _ in same]) for ids, same in itertools.groupby(prompt_ids)]
        return collect(
            self.engine,
            [ids for ids, _ in groups],
            [names for _, names in groups],
            sampling,
        )

    def _uids(self, prompt_ids: list[list[int]], num_generations: int) -> list[int]:
        """Names of the samples, of which the noise is a function. In training as softgrpo-train
        has them: (round * samples of a round + number in the round) mod 2^32. In evaluation the
        same at every one: (hash32(prompt ids) + number in the group) mod 2^32."""
        count = len(prompt_ids)
        first = self.accelerator.process_index * count
        if not self.model.training:
            return [
                default_uids(ids, 1, first=(first + i) % num_generations)[0]
                for i, ids in enumerate(prompt_ids)
            ]
        accumulated = self.args.gradient_accumulation_steps
        passes = self.state.global_step * accumulated + self._step % accumulated
        number = passes // (self.args.steps_per_generation * self.num_iterations)
        first += number * count * self.accelerator.num_processes
        return [(first + i) % 2**32 for i in range(count)]

    def _behaviour(self, lengths: list[int]) -> list[list[float]]:
        device, settings = self.accelerator.device, self.settings
        table = base_model(self.accelerator.unwrap_model(self.model)).get_input_embeddings().weight
        positions = on_device(self._batch(self._rows).positions(settings), device)
        positions = with_mixtures(positions, table, self._dtype, settings)
        density, known = behaviour_densities(rollout_logq(positions, settings), positions, settings)
        density = density.masked_fill(~(known | positions.classes.forced), math.nan)
        return [part.tolist() for part in density.cpu().split(lengths)]

    def _batch(self, rows: list[Output]) -> RolloutBatch:
        """A group a row, as TRL pads and shuffles them one by one."""
        stream = ROLLOUT_STREAM if self.model.training else EVALUATION_STREAM
        return RolloutBatch.from_outputs(
            rows, seed=self.args.seed, stream=stream, weight_version=self.engine.weight_version
        )

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """With the mask of tokens that were chosen: what a budget put there is learnt from as
        little as what a tool says."""
        prompt_ids, completion_ids, _, *rest = super()._generate(prompts)
        batch = self._batch(self._rows)
        chosen = (~batch.classes(self.settings).forced).int()
        mask = [part.tolist() for part in chosen.split(batch.response_lens.tolist())]
        return prompt_ids, completion_ids, mask, *rest

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        """With the record of every row and the sign of its advantage, on the host: TRL shuffles and
        splits them like the rest."""
        batch = super()._generate_and_score_completions(inputs)
        return batch | {"record": self._rows, "rewarded": batch["advantages"].cpu() > 0}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._rows, self._rewarded = inputs["record"], inputs["rewarded"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-densities [B, C] of the rows at hand, and the entropies of what they were drawn from.

        Padding is masked as the record says: TRL's attention_mask also leaves out what it does not
        learn from, whose densities would be of no text.
        """
        if not self.settings.soft_enabled:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                **others,
            )
        size, width = batch_size or len(input_ids), input_ids.shape[1] - logits_to_keep
        parts = []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            rewarded = None if self._rewarded is None else self._rewarded[rows]
            batch = self._batch(self._rows[rows])
            record = PaddedRecord.of(batch, width, logits_to_keep, self.settings, rewarded)
            record = on_device(record, self.accelerator.device)
            with self.accelerator.autocast():
                parts.append(model(input_ids=input_ids[rows], record=record))
        density, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return density, entropy if compute_entropy else None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """With the soft settings, which softgrpo-generate, -serve and -eval use by default."""
        super()._save(output_dir, state_dict)
        soft = soft_params(self._run.rollout, self._run.algorithm.objective)
        if soft is not None:
            file = Path(output_dir or self.args.output_dir) / SOFT_SETTINGS_FILE
            file.write_text(json.dumps({"soft": soft.to_dict()}, indent=2) + "\n")
