"""softgrpo-generate: a chat in the terminal that shows what every position was mixed from."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from softgrpo.cli.entropy_rules import ENTROPY_RULES, add_entropy_rules
from softgrpo.cli.errors import is_for_the_user, one_line_errors

if TYPE_CHECKING:
    from softgrpo_engine import LLM, Sample, SamplingParams, SoftParams
    from softgrpo_engine.requests.prompts import Prompt

_HELP = """\
/candidates  what each position of the last answer was mixed from
/clear       forget the conversation
/quit        leave (as Ctrl-D); Ctrl-C ends an answer"""

_OF_SOFT = ("tau", "max_soft_tokens", "min_soft_tokens", *ENTROPY_RULES)


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
        description="Talk to a model, with soft or discrete tokens. A prompt from --prompt or a "
        "pipe is answered once.",
    )
    add = parser.add_argument
    add("model", nargs="?", default="smollm2-135m", metavar="MODEL",
        help="directory, hub id or alias (%(default)s)")  # fmt: skip
    add("--prompt", help="answer this and leave; the answer alone goes to stdout")
    add("--raw", action="store_true", help="the prompt is text to be continued, no user's turn")
    add("--n", type=int, default=1, help="answers to the one prompt (%(default)s)")
    add("--candidates", action="store_true", help="show each position as it is drawn")
    add("--max-tokens", type=int, default=256, help="most new tokens (%(default)s)")
    add("--temperature", type=float, help="of soft and discrete positions; 0 is greedy")
    add("--top-p", type=float, help="of soft and discrete positions")
    add("--top-k", type=int, help="of soft and discrete positions")
    add("--tau", type=float, help="temperature of the mixture: small is nearly one token")
    add("--max-soft-tokens", type=int, help="thinking budget: then the rest is discrete")
    add("--min-soft-tokens", type=int, help="least thinking: before, nothing ends")
    add_entropy_rules(parser)
    add("--seed", type=int, help="the same seed gives the same answers")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--soft", action="store_true", help="soft tokens, whatever the model was for")
    mode.add_argument("--discrete", action="store_true", help="ordinary tokens")
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    is_chat = arguments.prompt is None and sys.stdin.isatty()
    if is_chat and (arguments.raw or arguments.n > 1):
        raise ValueError("--raw and --n need a --prompt")
    # Heavy imports come after the arguments are known to be good.
    from softgrpo_engine import LLM
    from softgrpo_engine.model.source import resolve_model

    params = _sampling_params(arguments)
    # Before stdin: what writes into the pipe may take long.
    model = resolve_model(arguments.model)
    text = None if is_chat else _prompt(arguments)
    llm = LLM(model, max_batch_size=arguments.n)
    session = _Session(llm, params, _soft_params(arguments, llm.default_soft), arguments.candidates)
    has_template = bool(llm.tokenizer.chat_template)
    if text is None and not has_template:
        raise ValueError(f"{arguments.model} has no chat template: give a --prompt to be continued")
    if text is None:
        _chat(session, arguments.model)
    else:
        chat = has_template and not arguments.raw
        session.answer([{"role": "user", "content": text}] if chat else text)


def _prompt(arguments: argparse.Namespace) -> str:
    """That of --prompt, or all of stdin."""
    text: str | None = arguments.prompt
    if text is None:
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
        for name in _given(arguments, *_OF_SOFT):
            raise ValueError(f"--{name.replace('_', '-')} is a setting of soft tokens: add --soft")
        return False
    changes = _given(arguments, "temperature", "top_p", "top_k", *_OF_SOFT)
    return dataclasses.replace(default or SoftParams(), **changes)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


class _Session:
    """A model with its settings: streams answers to stdout, remembers the last."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        soft: SoftParams | Literal[False],
        show_candidates: bool,
    ) -> None:
        self.llm, self.params, self.soft = llm, params, soft
        self.show_candidates = show_candidates
        self.mixture = soft.mixture if soft else (1.0, 0.0)
        self.console = Console(highlight=False)
        self.last: Sample | None = None
        self.interrupted = False

    def answer(self, prompt: Prompt) -> Sample:
        """Streams the answer; several are written one after the other, each when it is done."""
        done: list[Sample] = []
        seen = ""
        positions = 0
        for _, sample in self.llm.stream(prompt, self.params, self.soft):
            self.last = sample
            if sample.finish_reason:
                done.append(sample)
            if self.params.n > 1:
                if sample.finish_reason:
                    self._write_whole(sample)
            elif self.show_candidates:
                self._write_candidates(sample, positions)
                positions = len(sample.token_ids)
            # A character of several tokens is written when it is complete.
            elif sample.finish_reason or not sample.text.endswith("\ufffd"):
                sys.stdout.write(sample.text[len(seen) :])
                sys.stdout.flush()
                seen = sample.text
            if self.interrupted:
                self.llm.abort(sample)
        if self.params.n == 1:
            print(f"\n{done[0].text}" if self.show_candidates else "")
        return done[-1]

    def candidates(self) -> None:
        """The positions of the last answer."""
        if self.last is not None:
            self._write_candidates(self.last, 0)

    def _write_whole(self, sample: Sample) -> None:
        if self.show_candidates:
            self._write_candidates(sample, 0)
            print()
        print(sample.text, flush=True)

    def _write_candidates(self, sample: Sample, start: int) -> None:
        # Here, because it imports torch.
        from softgrpo.cli.candidates import candidate_lines

        width = self.console.width if self.console.is_terminal else 1000
        for line in candidate_lines(sample, self.llm.tokenizer, self.mixture, width, start):
            self.console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _chat(session: _Session, name: str) -> None:
    """Reads turns until Ctrl-D; commands start with a slash."""
    import readline  # noqa: F401 - gives input() its history and line editing

    kind = f"soft tokens, tau {session.mixture[0]:g}" if session.soft else "discrete tokens"
    session.console.print(f"{name}, {kind}. /help lists the commands.", style="dim")
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if text == "/quit":
            return
        if text == "/clear":
            turns.clear()
        elif text == "/candidates":
            session.candidates()
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            _turn(session, turns, text)


def _turn(session: _Session, turns: list[dict[str, str]], text: str) -> None:
    """One question and its answer; what cannot be asked leaves the conversation as it was."""
    question = {"role": "user", "content": text}
    start = time.perf_counter()
    try:
        with _ctrl_c_interrupts(session):
            sample = session.answer([*turns, question])
    except ValueError as error:
        if not is_for_the_user(error):
            raise
        session.console.print(f"{error} (/clear forgets the conversation)", style="red")
        return
    turns += [question, {"role": "assistant", "content": sample.text}]
    tokens, seconds = len(sample.token_ids), time.perf_counter() - start
    ended = {"length": ", cut at --max-tokens", "abort": ", interrupted"}
    session.console.print(
        f"{tokens} tokens, {tokens / seconds:.0f}/s{ended.get(sample.finish_reason or '', '')}",
        style="dim",
    )


@contextmanager
def _ctrl_c_interrupts(session: _Session) -> Iterator[None]:
    """Ctrl-C ends the answer, between two steps of the engine, and not the program."""

    def interrupt(*_: object) -> None:
        session.interrupted = True

    session.interrupted = False
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
