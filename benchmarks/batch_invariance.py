"""What batch_invariant=True costs, and how far rollouts drift apart without it.

    python benchmarks/batch_invariance.py --json benchmarks/results/batch_invariance.json

The same samples are drawn in one batch of 64 and in batches of 4. Noise is a function of a sample's
name, so a difference of g' is one of log p. It is measured up to the first position at which the
candidates differ: after that the two runs have read different things. Speed is that of the large
batch, prompts included, the two settings in turn. `unit` is what multiplies bf16, "" lanes of fp32.
A CPU with AVX2 or more takes the batch-invariant path in any case: there both settings are one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import hardware, versions
from rich.console import Console
from rich.table import Table

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.packed_linear import matrix_unit
from softgrpo_engine.outputs import Output

BATCH, SMALL_BATCH, PROMPT = 64, 4, 40
UNITS = {"": 0, "avx512_bf16": 1, "amx": 2}


def rollouts(llm: LLM, size: int, new_tokens: int, salt: int = 0) -> list[Output]:
    """The same BATCH samples in groups of `size` at a time; salt: of the prompts."""
    draw = torch.Generator().manual_seed(salt)
    prompts = torch.randint(1000, 40000, (BATCH, PROMPT), generator=draw).tolist()
    params = SamplingParams(top_k=5, top_p=0.95, max_tokens=new_tokens, ignore_eos=True)
    soft = SoftParams(tau=0.1, end_of_thinking=None)
    outputs: list[Output] = []
    for first in range(0, BATCH, size):
        some = prompts[first : first + size]
        uids = [[first + i] for i in range(len(some))]
        outputs += llm.generate_groups(some, params, soft, seed=0, uids=uids)
    return outputs


def drift(ours: list[Output], theirs: list[Output]) -> dict[str, float]:
    """Share of samples with any other bit, and largest difference of g' before candidates part."""
    changed, largest = 0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        x, y = a.samples[0].soft, b.samples[0].soft
        changed += not (torch.equal(x.ids, y.ids) and torch.equal(x.gprime, y.gprime))
        same = (x.ids == y.ids).all(-1).long().cumprod(0).bool()
        live = x.ids[same] >= 0
        gap = (x.gprime[same][live] - y.gprime[same][live]).abs()
        largest = max(largest, float(gap.max()) if len(gap) else 0.0)
    return {"changed_samples": changed / len(ours), "largest_difference": largest}


def measure(dtype: str, unit: str, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Both settings of one dtype and matrix unit, interleaved."""
    cpu_extension().limit_matrix_unit(UNITS[unit])
    engines = {
        invariant: LLM(
            "smollm2-135m",
            dtype=dtype,
            max_model_len=PROMPT + new_tokens,
            max_batch_size=BATCH,
            batch_invariant=invariant,
        )
        for invariant in (False, True)
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(-1, repeats):  # the first round only warms up
        for invariant, llm in engines.items():
            start = time.perf_counter()
            rollouts(llm, BATCH, new_tokens, salt=repeat + 2)
            if repeat >= 0:
                seconds[invariant].append(time.perf_counter() - start)
    return [
        {
            "dtype": dtype,
            "unit": unit,
            "batch_invariant": invariant,
            "tokens_per_second": round(BATCH * new_tokens / median(seconds[invariant]), 1),
            **drift(rollouts(llm, BATCH, new_tokens), rollouts(llm, SMALL_BATCH, new_tokens)),
        }
        for invariant, llm in engines.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{BATCH} samples in one batch, and in batches of {SMALL_BATCH}")
    for column in ("dtype", "bf16 by", "batch_invariant", "tokens/s", "changed", "largest |dg'|"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["dtype"],
            row["unit"] or "lanes",
            str(row["batch_invariant"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['changed_samples']:.0%}",
            f"{row['largest_difference']:.1e}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    best = matrix_unit()
    rows = []
    for dtype, unit in (("bfloat16", best), ("bfloat16", ""), ("float32", best)):
        rows += measure(dtype, unit, arguments.new_tokens, arguments.repeats)
    show(rows)
    if arguments.json:
        facts = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
        settings = {"new_tokens": arguments.new_tokens, "repeats": arguments.repeats}
        result = {**facts, "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
