"""softgrpo-generate: samples of a model, and what every soft position was mixed from."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softgrpo.cli.errors import one_line_errors

if TYPE_CHECKING:
    from softgrpo_engine import Output, Sample, SamplingParams, SoftParams

# A mixture can have more candidates than fit into a line; the best ones carry the weight.
_CANDIDATES_SHOWN = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-generate``; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with one_line_errors("softgrpo-generate"):
            _generate(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softgrpo-generate",
        description="Sample a model, with soft or discrete tokens, and show both.",
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="one or more; without any, all of stdin")
    add("--model", default="smollm2-135m", help="directory, hub id or alias (%(default)s)")
    add("--n", type=int, default=1, help="samples of each prompt (%(default)s)")
    add("--max-tokens", type=int, default=128, help="most new tokens (%(default)s)")
    add("--temperature", type=float, help="of soft and discrete positions; 0 is greedy")
    add("--top-p", type=float, help="of soft and discrete positions")
    add("--top-k", type=int, help="of soft and discrete positions")
    add("--tau", type=float, help="temperature of the mixture: small is nearly one token")
    add("--seed", type=int, help="the same seed gives the same samples")
    add("--text", action="store_true", help="print the text only, without the candidates")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--soft", action="store_true", help="soft tokens, whatever the model was for")
    mode.add_argument("--discrete", action="store_true", help="ordinary tokens")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="the prompt is a user's turn")
    form.add_argument("--raw", action="store_true", help="the prompt is text to be continued")
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    texts = arguments.prompts or [_stdin()]
    # Heavy imports come after the arguments are known to be good.
    from softgrpo_engine import LLM

    params = _sampling_params(arguments)
    llm = LLM(arguments.model)
    soft = _soft_params(arguments, llm.default_soft)
    chat = arguments.chat or (not arguments.raw and bool(llm.tokenizer.chat_template))
    if arguments.chat and not llm.tokenizer.chat_template:
        raise ValueError(f"{arguments.model} has no chat template: use --raw")
    prompts: Any = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, soft)
    seconds = time.perf_counter() - start
    tau = soft.tau if soft else 1.0
    console = Console(highlight=False)
    for text, output in zip(texts, outputs, strict=True):
        _show(console, text, output, llm.tokenizer, tau, arguments.text)
    if not arguments.text:
        tokens = sum(len(sample.token_ids) for output in outputs for sample in output.samples)
        kind = f"soft, tau {soft.tau:g}" if soft else "discrete"
        console.print(f"[dim]{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f}/s), {kind}")


def _stdin() -> str:
    if sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument or on stdin")
    text = sys.stdin.read().strip()
    if not text:
        raise ValueError("the prompt on stdin is empty")
    return text


def _sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    from softgrpo_engine import SamplingParams

    return SamplingParams(
        n=arguments.n,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        **_given(arguments, "temperature", "top_p", "top_k"),
    )


def _soft_params(
    arguments: argparse.Namespace, default: SoftParams | None
) -> SoftParams | Literal[False]:
    """The model's own soft settings (softgrpo.json) with what the command line changes."""
    from softgrpo_engine import SoftParams

    if arguments.discrete or (default is None and not arguments.soft):
        if arguments.tau is not None:
            raise ValueError("--tau is a setting of soft tokens: add --soft")
        return False
    changes = _given(arguments, "temperature", "top_p", "top_k", "tau")
    return dataclasses.replace(default or SoftParams(), **changes)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _show(
    console: Console, text: str, output: Output, tokenizer: Any, tau: float, text_only: bool
) -> None:
    for i, sample in enumerate(output.samples):
        if text_only:
            print(sample.text)
            continue
        title = f"[bold]{_shorten(text)}[/]"
        title += f"  sample {i + 1}/{len(output.samples)}" if len(output.samples) > 1 else ""
        console.rule(title, align="left")
        console.print(Text(sample.text))
        console.print(f"[dim]{len(sample.token_ids)} tokens, ended by {sample.finish_reason}")
        if bool(sample.soft.kind.any()):
            console.print(_candidates(sample, tokenizer, tau))


def _candidates(sample: Sample, tokenizer: Any, tau: float) -> Table:
    """A line for each position of the soft phase: its candidates and their weights."""
    from softgrpo_kernels import soft_weights

    record = sample.soft
    weights = soft_weights(record.gprime, record.kind, tau).tolist()
    ids, kinds = record.ids.tolist(), record.kind.tolist()
    width = min(_CANDIDATES_SHOWN, max(sum(i >= 0 for i in row) for row in ids))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", justify="right", style="dim", no_wrap=True, min_width=3)
    for j in range(width):
        table.add_column("token" if j == 0 else f"+{j}", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True, min_width=4)
    last = max(i for i, kind in enumerate(kinds) if kind)
    # The token after the last soft one ended the phase.
    for i in range(min(last + 2, len(ids))):
        cells: list[Text] = []
        for token, weight in list(zip(ids[i], weights[i], strict=True))[:width]:
            style = "bold" if weight >= 0.5 else "" if weight >= 0.01 else "dim"
            shown = _visible(tokenizer.decode([token])) if token >= 0 else ""
            cells += [Text(shown, style), Text(f"{weight:.2f}" if shown else "", style)]
        table.add_row(str(i), *cells)
    return table


def _visible(token: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def _shorten(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    line = line if len(line) <= width else line[: width - 1] + "…"
    return line.replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
