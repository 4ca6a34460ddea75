"""One GRPO step, part by part: soft and discrete, against TRL, against the machine.

    python benchmarks/train_step.py --compare trl --trl-python PATH --json results.json

8 prompts x 8 samples of exactly 64 tokens on SmolLM2-135M in bfloat16, sampled with temperature 1,
top_k 5, top_p 0.95; one optimizer step. Ours keeps float32 master weights and moments, TRL (with
transformers' generate) all in bfloat16, on a CPU without instructions for it in float32. Steps of
soft and discrete runs alternate; TRL runs after them in a process of its own; the first step of
each warms up. MFU: operations of the training passes, without the head, over the time of the update
and the measured bf16 GEMM rate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import hardware, spread, versions
from _peers import Absent, json_line, run_peer
from rich.console import Console
from rich.table import Table

from softgrpo import Config, Trainer
from softgrpo_engine import Output, SamplingParams
from softgrpo_engine.model.source import resolve_model
from softgrpo_engine.ops.linear import has_bf16_products

PARTS = ("time/rollout", "time/reward", "time/train", "time/sync")


def alternating(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that gives every group a spread, whatever was said."""
    return [float(i % 2) for i in range(len(completions))]


def make_trainer(arguments: argparse.Namespace, soft: bool, folder: str) -> Trainer:
    overrides = [
        f"run.output_dir={folder}",
        f"run.name={'soft' if soft else 'discrete'}",
        f"rollout.soft.enabled={str(soft).lower()}",
        f"rollout.prompts_per_step={arguments.prompts}",
        f"rollout.group_size={arguments.group_size}",
        f"rollout.max_new_tokens={arguments.new_tokens}",
        f"optim.gradient_checkpointing={str(arguments.gradient_checkpointing).lower()}",
        "optim.lr=1e-6",
        "log.samples_every=0",
        "reward.require_eos=false",
        *arguments.overrides,
    ]
    trainer = Trainer(Config.load("demo", overrides), reward_funcs=[alternating])
    iter_groups = trainer.llm.iter_groups

    def full_length(
        groups: Any, params: SamplingParams, *rest: Any, **options: Any
    ) -> Iterator[tuple[int, Output]]:
        return iter_groups(groups, replace(params, ignore_eos=True), *rest, **options)

    trainer.llm.iter_groups = full_length  # type: ignore[method-assign]
    return trainer


def training_flops(trainer: Trainer, tokens: float, context: float) -> float:
    """Of the passes over so many tokens that attend to `context` others on average, without the
    head: a position needs the products of its few candidates."""
    decoder, config = trainer.policy.decoder, trainer.config
    shape = decoder.config
    weights = sum(p.numel() for p in decoder.model.layers.parameters())
    attention = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * context
    passes = 3 + config.optim.gradient_checkpointing + (config.algorithm.kl_coef > 0)
    return tokens * passes * (2.0 * weights + attention)


def ours(arguments: argparse.Namespace, peak_flops: float) -> list[dict[str, Any]]:
    """Both modes, their steps in turn."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            mode: make_trainer(arguments, mode == "soft", folder) for mode in ("soft", "discrete")
        }
        steps: dict[str, list[dict[str, Any]]] = {mode: [] for mode in trainers}
        for step in range(1, arguments.steps + 2):
            for mode, trainer in trainers.items():
                steps[mode].append(trainer.step(step))
        rows = []
        for mode, trainer in trainers.items():
            taken = steps[mode][1:]
            drawn = trainer.data.prompts_of_round(1, arguments.prompts)
            prompts = [len(prompt.token_ids) for prompt in drawn]
            responses = arguments.prompts * arguments.group_size * arguments.new_tokens
            context = sum(prompts) / len(prompts) + arguments.new_tokens / 2
            flops = training_flops(trainer, sum(prompts) + responses, context)
            update = median(row["time/train"] for row in taken)
            seconds = [sum(row[part] for part in PARTS) for row in taken]
            rows.append(
                {
                    "engine": "softgrpo",
                    "mode": mode,
                    "seconds": round(median(seconds), 3),
                    "spread": round(spread(seconds), 3),
                    **{p: round(median(row[p] for row in taken), 3) for p in PARTS},
                    "tokens_per_second": round(responses / median(seconds), 1),
                    "mfu": round(flops / update / peak_flops, 3),
                }
            )
            trainer.rewards.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [row | {"peak_gib_of_both": round(peak, 1)} for row in rows]


def trl(arguments: argparse.Namespace) -> dict[str, Any]:
    """TRL's GRPOTrainer with the same questions."""
    if arguments.trl_python is None or not arguments.trl_python.exists():
        raise Absent("give its interpreter with --trl-python")
    config = Config.load("demo")
    shot = config.data.few_shot[0]
    texts = [
        f"{config.data.system_prompt} {shot.prompt} {shot.answer} What is {a} + {b}?"
        for a in range(10, 20)
        for b in range(10, 20)
    ]
    settings = {
        "model": str(resolve_model("smollm2-135m")),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if has_bf16_products() else "float32",
        "texts": texts,
        **{k: getattr(arguments, k) for k in ("prompts", "group_size", "new_tokens", "steps")},
    }
    script = str(Path(__file__).parent / "_trl_peer.py")
    done = run_peer([str(arguments.trl_python), script], settings["threads"], json.dumps(settings))
    found = json_line(done)
    tokens = arguments.prompts * arguments.group_size * arguments.new_tokens
    return {
        "engine": "trl",
        "mode": "discrete",
        "dtype": settings["dtype"],
        "seconds": round(median(found["seconds"]), 3),
        "spread": round(spread(found["seconds"]), 3),
        "tokens_per_second": round(tokens / median(found["seconds"]), 1),
        "peak_gib": round(found["peak_gib"], 1),
    }


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    names = ("rollout", "reward", "update", "sync")
    for column in ("", "step", *names, "tok/s", "MFU", "x soft"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["mode"] if row["engine"] == "softgrpo" else row["engine"],
            f"{row['seconds']:.2f}",
            *(f"{row[part]:.2f}" if part in row else "" for part in PARTS),
            f"{row['tokens_per_second']:.0f}",
            f"{row['mfu']:.0%}" if "mfu" in row else "",
            f"{row['seconds'] / rows[0]['seconds']:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="settings of the demo, as model.path=PATH")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compare", choices=["trl"])
    parser.add_argument("--trl-python", type=Path, help="interpreter that has TRL")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = hardware(torch.device("cpu"))
    rows = ours(arguments, facts["bf16_gemm_gflops"] * 1e9)
    absent = {}
    if arguments.compare == "trl":
        try:
            rows.append(trl(arguments))
        except (Absent, subprocess.SubprocessError) as error:
            absent["trl"] = str(error)
    samples = arguments.prompts * arguments.group_size
    show(rows, f"a GRPO step: {samples} samples x {arguments.new_tokens} tokens, smollm2-135m")
    for peer, reason in absent.items():
        print(f"{peer} is absent: {reason}")
    if arguments.json:
        names = (
            "prompts",
            "group_size",
            "new_tokens",
            "steps",
            "gradient_checkpointing",
            "overrides",
        )
        settings = {name: getattr(arguments, name) for name in names}
        result = {"hardware": facts, "versions": versions(), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(result | {"absent": absent}, indent=1) + "\n")


if __name__ == "__main__":
    main()
