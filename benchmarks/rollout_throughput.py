"""Rollout throughput: soft against discrete tokens, against transformers, against the machine.

    python benchmarks/rollout_throughput.py --compare transformers --json results.json

All sample with the same temperature, top_k and top_p, from distinct prompts of equal length, and
all produce the same number of tokens. Time includes the prompts; `decode` is what is left of it
without the time of the same run with one new token. The runs of a repeat are interleaved, so that a
slow moment of the machine hits all of them (vLLM and llama.cpp run after them, as processes of
their own); a figure is the median of the repeats.

The limit is what the machine cannot exceed: a step reads all weights and the keys and values, at
the rate of a plain read, and does two operations for each weight and token, at the rate of the
product's instruction in registers; each part takes the longer of the two, and the parts add up.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from _machine import hardware, seconds_of, spread, versions
from _peers import Absent, PeerSettings, Seconds, llama_build, llama_cpp, vllm
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.ops.extension import cpu_extension

TEXT = (
    "{0} apples, {1} pears and {2} plums lie in a basket; {3} of them are eaten on the first day "
    "and {4} more on the next one. How many pieces of fruit are left in the end? Think about it "
    "step by step, and put the final answer on a line of its own."
)


# Beyond this share of a ratio its quartiles are printed.
WIDE = 0.05

# Takes the prompts and the number of new tokens.
Run = Callable[[list[list[int]], int], None]


@dataclass
class Row:
    """One line of the result: how many tokens a second, median over the repeats.

    seconds: of whole runs; first_seconds: of runs that stop at the first new token.
    """

    engine: str
    mode: str
    batch: int
    new_tokens: int
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.new_tokens / median(self.seconds)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Without the prompts; None where it was not measured."""
        if not self.first_seconds:
            return None
        decode = median(self.seconds) - median(self.first_seconds)
        return self.batch * (self.new_tokens - 1) / decode

    def to_dict(self) -> dict[str, Any]:
        decode = self.decode_tokens_per_second
        return {
            "engine": self.engine,
            "mode": self.mode,
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "decode_tokens_per_second": decode and round(decode, 2),
            "spread": round(spread(self.seconds), 3),
            "quartiles": [
                round(x, 2) for x in self._quartiles([self._speed(s) for s in self.seconds])
            ],
        }

    def _speed(self, seconds: float) -> float:
        return self.batch * self.new_tokens / seconds

    @staticmethod
    def _quartiles(values: list[float]) -> tuple[float, float]:
        if len(values) < 2:
            return values[0], values[0]
        first, _, third = quantiles(values, n=4, method="inclusive")
        return first, third

    def ratio_to(self, other: Row) -> str:
        """How many times as fast as the other, whose runs alternate with these: the median of the
        pairs, with its quartiles where they lie apart."""
        pairs = [theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]
        low, high = self._quartiles(pairs)
        text = f"{median(pairs):.2f}"
        return text if high - low <= WIDE * median(pairs) else f"{text} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Measures, prints and writes."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.no_amx:
        # As on a CPU with AVX512-BF16 alone: oneDNN's products and ours, and with them the limit.
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        cpu_extension().limit_matrix_unit(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    llm = LLM(
        arguments.model,
        max_model_len=arguments.prompt_tokens + arguments.new_tokens,
        max_batch_size=max(arguments.batch_sizes),
    )
    machine = hardware(device)
    rows = _measure(arguments, _runs(arguments, llm), llm.tokenizer, device)
    absent = _measure_others(arguments, llm, rows)
    limits = {batch: _limit(llm, machine, batch, arguments) for batch in arguments.batch_sizes}
    _print(console, rows, limits, machine, arguments)
    for name, reason in absent.items():
        console.print(f"[yellow]{name} is absent: {reason}[/]")
    builds = {}
    if any(row.engine == "llama.cpp" for row in rows):
        build = llama_build(arguments.llama_bench, arguments.llama_gguf, machine["isa"])
        builds["llama.cpp"] = build
        console.print("llama.cpp was built for:", *build.get("features", ["unknown"]))
        if build.get("unused"):
            console.print("[yellow]This machine also has:", *build["unused"])
    if arguments.json:
        _write(arguments, machine, rows, limits, absent, builds)


def _measure(
    arguments: argparse.Namespace,
    runs: dict[tuple[str, str], Run],
    tokenizer: Any,
    device: torch.device,
) -> list[Row]:
    """The engines of this process, interleaved."""
    rows = [
        Row(engine, mode, batch, arguments.new_tokens)
        for batch in arguments.batch_sizes
        for engine, mode in runs
    ]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(rows) * (arguments.repeats + 1))
        for repeat in range(-1, arguments.repeats):  # the first round only warms up
            for i, row in enumerate(rows):
                run = runs[row.engine, row.mode]
                # Prompts of its own for every run: none finds those of another in the prefix cache.
                salt = 2 * ((repeat + 1) * len(rows) + i)
                for new_tokens, seconds in ((row.new_tokens, row.seconds), (1, row.first_seconds)):
                    prompts = _prompts(tokenizer, row.batch, arguments.prompt_tokens, salt)
                    tokens = new_tokens if repeat >= 0 else min(4, new_tokens)
                    taken = seconds_of(lambda: run(prompts, tokens), device)  # noqa: B023
                    if repeat >= 0:
                        seconds.append(taken)
                    salt += 1
                bar.advance(task)
    return rows


def _measure_others(arguments: argparse.Namespace, llm: LLM, rows: list[Row]) -> dict[str, str]:
    """Adds the rows of engines in other processes; returns why one is absent."""
    settings = PeerSettings(
        model=str(llm.model_path),
        sampling=_sampling(arguments),
        **{
            name: getattr(arguments, name)
            for name in ("batch_sizes", "prompt_tokens", "new_tokens", "repeats", "threads")
        },
    )
    peers: dict[str, Callable[[], Seconds]] = {
        "vllm": lambda: vllm(arguments.vllm_python, settings),
        "vllm-soft": lambda: vllm(arguments.vllm_python, replace(settings, soft_tau=arguments.tau)),
        "llama.cpp": lambda: llama_cpp(arguments.llama_bench, arguments.llama_gguf, settings),
    }
    absent = {}
    for name in arguments.compare:
        if name not in peers:
            continue
        try:
            found = peers[name]()
        except Absent as error:
            absent[name] = str(error)
            continue
        for mode, batches in found.items():
            for batch, seconds in batches.items():
                rows.append(Row(name, mode, batch, arguments.new_tokens, seconds))
    return absent


def _write(
    arguments: argparse.Namespace,
    machine: dict[str, Any],
    rows: list[Row],
    limits: dict[int, float],
    absent: dict[str, str],
    builds: dict[str, Any],
) -> None:
    # Paths say nothing to others.
    hidden = ("json", "vllm_python", "llama_bench", "llama_gguf")
    settings = {key: value for key, value in vars(arguments).items() if key not in hidden}
    document = {
        "hardware": machine,
        "versions": versions(),
        "settings": {**settings, "dtype": "bfloat16"},
        "absent": absent,
        **({"builds": builds} if builds else {}),
        "rows": [
            {**row.to_dict(), "of_limit": float(f"{row.tokens_per_second / limits[row.batch]:.3g}")}
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
    add("--prompt-tokens", type=int, default=40, help="of every prompt")
    peers = ["transformers", "vllm", "vllm-soft", "llama.cpp"]  # soft: by our plug-in
    add("--compare", nargs="+", choices=peers, default=[], help="measure these as well")
    add("--vllm-python", type=Path, metavar="PYTHON", help="interpreter that has vLLM")
    add("--llama-bench", type=Path, metavar="BINARY", help="llama-batched-bench of llama.cpp")
    add("--llama-gguf", type=Path, metavar="FILE", help="the model for it, in bf16")
    add("--no-amx", action="store_true", help="as if the CPU had AVX512-BF16 at best")
    add("--threads", type=int, default=torch.get_num_threads(), help="of all")
    add("--repeats", type=int, default=3, help="the median is shown")
    add("--temperature", type=float, default=1.0, help="of all")
    add("--top-k", type=int, default=5, help="of all")
    add("--top-p", type=float, default=0.95, help="of all")
    add("--tau", type=float, default=0.1, help="of the soft tokens")
    add("--json", type=Path, metavar="FILE", help="write the rows here")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _prompts(tokenizer: Any, batch: int, length: int, salt: int) -> list[list[int]]:
    """Distinct prompts of equal length, other ones for every salt."""
    first = 1000 + 37 * (batch + 200 * salt)
    texts = [TEXT.format(*(first + i + 11 * j for j in range(5))) for i in range(batch)]
    repeated = [text * (1 + length // 40) for text in texts]
    return [tokenizer.encode(text, add_special_tokens=False)[:length] for text in repeated]


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}


def _runs(arguments: argparse.Namespace, llm: LLM) -> dict[tuple[str, str], Run]:
    sampling = _sampling(arguments)
    soft = SoftParams(**sampling, tau=arguments.tau, end_of_thinking=None)

    def ours(prompts: list[list[int]], new_tokens: int, mode: SoftParams | Literal[False]) -> None:
        params = SamplingParams(**sampling, max_tokens=new_tokens, ignore_eos=True)
        uids = [[i] for i in range(len(prompts))]
        llm.generate_groups(prompts, params, mode, seed=0, uids=uids)

    runs: dict[tuple[str, str], Run] = {
        ("softgrpo", "soft"): lambda prompts, n: ours(prompts, n, soft),
        ("softgrpo", "discrete"): lambda prompts, n: ours(prompts, n, False),
    }
    if "transformers" in arguments.compare:
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


def _limit(llm: LLM, machine: dict[str, Any], batch: int, arguments: argparse.Namespace) -> float:
    """Tokens a second that products and bandwidth of the machine allow."""
    decoder, config = llm.runner.decoder, llm.config
    flops = machine.get("register_gflops", machine["bf16_gemm_gflops"]) * 1e9
    bandwidth = machine.get("memory_read_gb_per_s", machine["memory_gb_per_s"]) * 1e9
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in decoder.named_parameters() if "layers" in name)
    kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    new_tokens = arguments.new_tokens
    context = arguments.prompt_tokens + new_tokens / 2
    prompts = 2 * (body * batch * arguments.prompt_tokens + head * batch) / flops
    products = max(2 * (body + head) * batch / flops, 2 * (body + head) / bandwidth)
    scores = 4 * config.num_layers * config.num_heads * config.head_dim
    attention = max(batch * context * scores / flops, batch * context * kv_bytes / bandwidth)
    step = products + attention
    return batch * new_tokens / (prompts + (new_tokens - 1) * step)


def _with_ratio(
    speed: dict[tuple[str, str, int], float], key: tuple[str, str, int], soft: float
) -> str:
    return f"{speed[key]:.0f} ({soft / speed[key]:.1f}x)"


def _print(
    console: Console,
    rows: list[Row],
    limits: dict[int, float],
    machine: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    speed = {(r.engine, r.mode, r.batch): r.tokens_per_second for r in rows}
    decode = {(r.engine, r.mode, r.batch): r.decode_tokens_per_second for r in rows}
    soft = {batch: speed["softgrpo", "soft", batch] for batch in arguments.batch_sizes}
    table = Table(title=f"{arguments.model}: tokens/s, {arguments.new_tokens} new tokens")
    table.add_column("batch")
    for batch in arguments.batch_sizes:
        table.add_column(str(batch), justify="right")

    def line(name: str, cell: Callable[[int], str]) -> None:
        table.add_row(name, *(cell(batch) for batch in arguments.batch_sizes))

    for engine, mode in dict.fromkeys((row.engine, row.mode) for row in rows):
        name = f"{engine} {mode}"
        if engine != "softgrpo":
            line(f"{name} (soft / it)", lambda b: _with_ratio(speed, (engine, mode, b), soft[b]))  # noqa: B023
            continue
        line(name, lambda b: f"{speed[engine, mode, b]:.0f}")  # noqa: B023
        line("  without the prompts", lambda b: f"{decode[engine, mode, b] or 0:.0f}")  # noqa: B023
    by_key = {(row.engine, row.mode, row.batch): row for row in rows}
    line(
        "soft / discrete",
        lambda b: by_key["softgrpo", "soft", b].ratio_to(by_key["softgrpo", "discrete", b]),
    )
    line("limit (soft / it)", lambda b: f"{limits[b]:.0f} ({soft[b] / limits[b]:.2f})")
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
