"""Rollout throughput: soft against discrete tokens, against transformers, against the machine.

    python benchmarks/rollout_throughput.py --compare transformers --json results.json

All sample with the same temperature, top_k and top_p, from distinct prompts of 40 tokens, and all
produce the same number of tokens. Time includes the prompts. The runs of a repeat are interleaved,
so that a slow moment of the machine hits all of them; a figure is the median of the repeats.

The limit is what the measured GEMM rate and memory bandwidth allow: a step reads all weights and
the keys and values, and does two operations for each weight and token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from _machine import hardware, seconds_of, spread, versions
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from softgrpo_engine import LLM, SamplingParams, SoftParams

PROMPT_TOKENS = 40
TEXT = (
    "{0} apples, {1} pears and {2} plums lie in a basket; {3} of them are eaten on the first day "
    "and {4} more on the next one. How many pieces of fruit are left in the end? Think about it "
    "step by step, and put the final answer on a line of its own."
)


@dataclass
class Row:
    """One line of the result: how many tokens a second, median over the repeats."""

    engine: str
    mode: str
    batch: int
    new_tokens: int
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.new_tokens / median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "mode": self.mode,
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "spread": round(spread(self.seconds), 3),
        }


def main() -> None:
    arguments = _parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    llm = LLM(
        arguments.model,
        max_model_len=PROMPT_TOKENS + arguments.new_tokens,
        max_batch_size=max(arguments.batch_sizes),
    )
    runs = _runs(arguments, llm)
    machine = hardware(device)
    rows = [
        Row(engine, mode, batch, arguments.new_tokens)
        for batch in arguments.batch_sizes
        for engine, mode in runs
    ]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(rows) * (arguments.repeats + 1))
        for repeat in range(-1, arguments.repeats):  # the first round only warms up
            for i, row in enumerate(rows):
                # Prompts of its own for every run: none finds those of another in the prefix cache.
                prompts = _prompts(llm.tokenizer, row.batch, (repeat + 1) * len(rows) + i)
                run = runs[row.engine, row.mode]
                new_tokens = row.new_tokens if repeat >= 0 else min(4, row.new_tokens)
                seconds = seconds_of(lambda: run(prompts, new_tokens), device)  # noqa: B023
                if repeat >= 0:
                    row.seconds.append(seconds)
                bar.advance(task)
    limits = {
        batch: _limit(llm, machine, batch, arguments.new_tokens) for batch in arguments.batch_sizes
    }
    _print(console, rows, limits, machine, arguments)
    if arguments.json:
        document = {
            "hardware": machine,
            "versions": versions(),
            "settings": {
                **{key: value for key, value in vars(arguments).items() if key != "json"},
                "prompt_tokens": PROMPT_TOKENS,
                "dtype": "bfloat16",
            },
            "rows": [
                {**row.to_dict(), "of_limit": round(row.tokens_per_second / limits[row.batch], 3)}
                for row in rows
            ],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokens a second of soft and discrete rollouts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="directory, hub id or alias")
    add("--batch-sizes", type=_numbers, default=[1, 8, 32, 64], metavar="1,8,...", help="samples")
    add("--new-tokens", type=int, default=64, help="generated tokens of every sample")
    add("--compare", choices=["transformers"], help="measure this as well")
    add("--repeats", type=int, default=3, help="the median is shown")
    add("--temperature", type=float, default=1.0, help="of all")
    add("--top-k", type=int, default=5, help="of all")
    add("--top-p", type=float, default=0.95, help="of all")
    add("--tau", type=float, default=0.1, help="of the soft tokens")
    add("--json", type=Path, metavar="FILE", help="write the rows here")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _prompts(tokenizer: Any, batch: int, salt: int) -> list[list[int]]:
    """Distinct prompts of equal length, other ones for every salt."""
    first = 1000 + 37 * (batch + 200 * salt)
    texts = [TEXT.format(*(first + i + 11 * j for j in range(5))) for i in range(batch)]
    return [tokenizer.encode(text, add_special_tokens=False)[:PROMPT_TOKENS] for text in texts]


Run = Callable[[list[list[int]], int], None]


def _runs(arguments: argparse.Namespace, llm: LLM) -> dict[tuple[str, str], Run]:
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    soft = SoftParams(**sampling, tau=arguments.tau, end_of_thinking=None)

    def ours(prompts: list[list[int]], new_tokens: int, mode: SoftParams | Literal[False]) -> None:
        params = SamplingParams(**sampling, max_tokens=new_tokens, ignore_eos=True)
        uids = [[i] for i in range(len(prompts))]
        llm.generate_groups(prompts, params, mode, seed=0, uids=uids)

    runs: dict[tuple[str, str], Run] = {
        ("softgrpo", "soft"): lambda prompts, n: ours(prompts, n, soft),
        ("softgrpo", "discrete"): lambda prompts, n: ours(prompts, n, False),
    }
    if arguments.compare:
        runs["transformers", "discrete"] = _transformers(llm, sampling)
    return runs


def _transformers(llm: LLM, sampling: dict[str, Any]) -> Run:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(llm.model_path), dtype=torch.bfloat16)
    model = model.to(llm.runner.device).eval()
    # No id ends a sample: all produce the same number of tokens.
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **sampling,
        )
        if out.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError("transformers ended early: the figures would not compare")

    return run


def _limit(llm: LLM, machine: dict[str, Any], batch: int, new_tokens: int) -> float:
    """Tokens a second that GEMM rate and bandwidth of the machine allow."""
    decoder, config = llm.runner.decoder, llm.config
    flops, bandwidth = machine["bf16_gemm_gflops"] * 1e9, machine["memory_gb_per_s"] * 1e9
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in decoder.named_parameters() if "layers" in name)
    kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    context = PROMPT_TOKENS + new_tokens / 2
    prompts = 2 * (body * batch * PROMPT_TOKENS + head * batch) / flops
    gemm = max(2 * (body + head) * batch / flops, 2 * (body + head) / bandwidth)
    step = gemm + batch * context * kv_bytes / bandwidth
    return batch * new_tokens / (prompts + (new_tokens - 1) * step)


def _print(
    console: Console,
    rows: list[Row],
    limits: dict[int, float],
    machine: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    speed = {(r.engine, r.mode, r.batch): r.tokens_per_second for r in rows}
    table = Table(title=f"{arguments.model}: tokens/s, {arguments.new_tokens} new tokens")
    columns = ["batch", "soft", "discrete", "soft / discrete", "limit", "soft / limit"]
    if arguments.compare:
        columns += [arguments.compare, f"soft / {arguments.compare}"]
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for batch in arguments.batch_sizes:
        soft, discrete = speed["softgrpo", "soft", batch], speed["softgrpo", "discrete", batch]
        limit = limits[batch]
        cells = [soft, discrete, soft / discrete, limit, soft / limit]
        if arguments.compare:
            theirs = speed[arguments.compare, "discrete", batch]
            cells += [theirs, soft / theirs]
        table.add_row(str(batch), *(f"{x:.2f}" if x < 20 else f"{x:.0f}" for x in cells))
    console.print(table)
    console.print(
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, bf16 GEMM "
        f"{machine['bf16_gemm_gflops']:.0f} GFLOP/s, memory {machine['memory_gb_per_s']:.0f} GB/s; "
        f"temperature {arguments.temperature:g}, top_k {arguments.top_k}, top_p "
        f"{arguments.top_p:g}, tau {arguments.tau:g}; median of {arguments.repeats}, largest "
        f"spread {max(spread(row.seconds) for row in rows):.0%}"
    )


if __name__ == "__main__":
    main()
