"""The same samples from the engines of the trainer, and each replayed through transformers.

    python benchmarks/engines.py --engines native vllm hf --json results.json

A sample is a function of (weights, prompt, seed, uid, settings), so that engines may differ by
rounding alone: where two candidates are closer than that, the texts part. `equal` counts the
positions up to there. The replay feeds the recorded mixtures to transformers; its error is the
largest |log p - (g' - noise)| of a candidate.

Without a GPU vLLM runs on Triton's interpreter, as in tests/vllm_plugin: its seconds say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from softgrpo.rollout.engines import load_engine
from softgrpo_engine import Output, SamplingParams, SoftParams
from softgrpo_engine.model.source import resolve_model
from softgrpo_kernels import gumbel_noise, soft_embedding, soft_weights

QUESTIONS = (
    "What is 17 + 25?",
    "Ann has 3 apples and eats one. How many are left?",
    "Name the capital of France.",
    "Write one line about the sea.",
)
SEED, TAU = 7, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="directory, alias or hub id (%(default)s)")
    add(
        "--engines", nargs="+", default=["native", "hf"], help="the first is what others must equal"
    )
    add("--samples", type=int, default=2, help="of a prompt (%(default)s)")
    add("--tokens", type=int, default=24, help="of a sample (%(default)s)")
    add("--dtype", default="float32", help="%(default)s")
    add("--json", type=Path, help="writes the figures here")
    arguments = parser.parse_args()
    if "vllm" in arguments.engines and not torch.cuda.is_available():
        _take_the_interpreter()
    path = resolve_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    groups = [
        (_prompt(tokenizer, question), range(i * arguments.samples, (i + 1) * arguments.samples))
        for i, question in enumerate(QUESTIONS)
    ]
    outputs, rows = {}, []
    for name in arguments.engines:
        options = {"tokenizer": tokenizer, "dtype": arguments.dtype, "max_batch_size": 8}
        longest = max(len(prompt) for prompt, _ in groups) + arguments.tokens
        engine = load_engine(name)(path, max_model_len=longest, **options)
        params = SamplingParams(top_k=5, max_tokens=arguments.tokens, ignore_eos=True)
        soft = SoftParams(tau=TAU, end_of_thinking=None)
        started = time.perf_counter()
        found = dict(engine.iter_groups(iter(groups), params, soft, seed=SEED))
        seconds = time.perf_counter() - started
        outputs[name] = [found[i] for i in range(len(groups))]
        rows.append({"engine": name, "seconds": seconds})
    hf = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
    for row in rows:
        mine, first = outputs[row["engine"]], outputs[arguments.engines[0]]
        row |= _against(mine, first) | {"replay": max(_replay_error(hf, o) for o in mine)}
    _print(rows, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _take_the_interpreter() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm_plugin"))
    import interpreter  # noqa: F401


def _prompt(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def _against(mine: list[Output], others: list[Output]) -> dict[str, Any]:
    """How far texts are those of other outputs, and their log p there."""
    equal = total = same = 0
    apart = 0.0
    for output, other in zip(mine, others, strict=True):
        for sample, twin in zip(output.samples, other.samples, strict=True):
            pairs = list(zip(sample.token_ids, twin.token_ids, strict=True))
            until = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            equal, total, same = equal + until, total + len(pairs), same + (until == len(pairs))
            differences = (sample.logprobs[:until] - twin.logprobs[:until]).abs()
            apart = max(apart, float(differences.max())) if until else apart
    return {"equal": equal, "positions": total, "same_samples": same, "logp": apart}


@torch.no_grad()
def _replay_error(hf: Any, output: Output) -> float:
    """Of the samples of a prompt, see above."""
    table_VH, worst = hf.get_input_embeddings().weight, 0.0
    prompt = torch.tensor(output.prompt_token_ids)
    for sample in output.samples:
        soft = sample.soft
        fed = soft_embedding(soft.ids, soft_weights(soft.gprime, soft.kind, TAU), table_VH)
        inputs = torch.cat([table_VH[prompt], fed])[None, :-1]
        logits = hf(inputs_embeds=inputs).logits[0, len(prompt) - 1 :].float()
        used = soft.ids >= 0
        logp = logits.gather(1, soft.ids.long().clamp(min=0)).masked_fill(~used, -torch.inf)
        position = torch.arange(len(prompt), len(prompt) + len(soft.ids))
        seed, uid = torch.full_like(position, SEED), torch.full_like(position, sample.uid)
        noise = gumbel_noise(soft.ids.clamp(min=0), seed, position, uid, 0 * position)
        error = (logp.log_softmax(-1) - (soft.gprime - noise))[used & (soft.kind == 1)[:, None]]
        worst = max(worst, float(error.abs().max()))
    return worst


def _print(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    table = Table(title=f"{arguments.model}, {arguments.dtype}")
    for head in ("engine", f"equal to {rows[0]['engine']}", "log p apart", "replay", "tokens/s"):
        table.add_column(head, justify="right")
    for row in rows:
        equal = f"{row['equal']} of {row['positions']} positions"
        speed = row["positions"] / row["seconds"]
        numbers = f"{row['logp']:.1e}", f"{row['replay']:.1e}", f"{speed:.1f}"
        table.add_row(row["engine"], equal, *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
