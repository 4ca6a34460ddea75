"""What every soft-thinking method costs in rollouts, beside discrete sampling.

    python benchmarks/methods.py --dtype float32 --json benchmarks/results/methods.json

The same prompts, batch and length for all, interleaved; a row's ratio is the median over the rounds
of its tokens/s over those of discrete sampling in the same round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from _machine import hardware, versions

from softgrpo_engine import LLM, SamplingParams, SoftParams

PROMPT_TOKENS = 16  # few: what is compared are the steps after them
METHODS: dict[str, SoftParams | None] = {
    "discrete": None,
    "gumbel": SoftParams(),
    "gumbel, floor 0.1": SoftParams(weight_floor=0.1),
    "multiplex 3": SoftParams(noise="multiplex", noise_scale=3, tau=1.0),
    "multiplex_weighted 3": SoftParams(noise="multiplex_weighted", noise_scale=3, tau=1.0),
    "mixture_of_inputs": SoftParams(noise="mixture_of_inputs", tau=1.0),
    "mean": SoftParams(noise="mean", tau=1.0),
    "embedding": SoftParams(noise="embedding", noise_scale=0.33, tau=1.0),
    "dirichlet": SoftParams(noise="dirichlet", tau=1.0),
    "none": SoftParams(noise="none", tau=1.0),
    "none, cold stop": SoftParams(noise="none", tau=1.0, cold_stop_entropy=1e-6),
    "none, switch": SoftParams(noise="none", tau=1.0, switch_window=512),
}


def rate(llm: LLM, soft: SoftParams | None, batch: int, new_tokens: int, salt: int) -> float:
    """Tokens/s of one batch of prompts that no other run had."""
    generator = torch.Generator().manual_seed(salt)
    shape = (batch, PROMPT_TOKENS)
    prompts = torch.randint(100, 40_000, shape, generator=generator).tolist()
    params = SamplingParams(top_k=5, top_p=0.95, max_tokens=new_tokens, ignore_eos=True, seed=salt)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, soft or False)
    seconds = time.perf_counter() - started
    return sum(len(sample.token_ids) for o in outputs for sample in o.samples) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches, new_tokens = arguments.batch_sizes, arguments.new_tokens
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=PROMPT_TOKENS + new_tokens,
        max_batch_size=max(batches),
    )
    rows = []
    for batch in batches:
        rates: dict[str, list[float]] = {name: [] for name in METHODS}
        for turn in range(-1, arguments.rounds):  # the first one warms up
            for i, (name, soft) in enumerate(METHODS.items()):
                found = rate(llm, soft, batch, new_tokens, salt=(turn + 1) * len(METHODS) + i)
                if turn >= 0:
                    rates[name].append(found)
        for name, values in rates.items():
            ratios = sorted(v / d for v, d in zip(values, rates["discrete"], strict=True))
            row = {
                "method": name,
                "batch": batch,
                "tokens_per_second": round(median(values), 1),
                "ratio": round(median(ratios), 3),
                "ratio_low": round(ratios[0], 3),
                "ratio_high": round(ratios[-1], 3),
            }
            rows.append(row)
            print(
                f"batch {batch:3}  {name:22} {row['tokens_per_second']:8,.1f} tokens/s  "
                f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
                flush=True,
            )
    if arguments.json:
        facts = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
        settings = {"dtype": arguments.dtype, "threads": arguments.threads, "rounds": len(values)}
        text = json.dumps({**facts, **settings, "new_tokens": new_tokens, "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
