"""softgrpo-eval: mean@n, pass@k and maj@n of a model, with soft and with discrete tokens."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from softgrpo.cli.entropy_rules import ENTROPY_RULES, add_entropy_rules
from softgrpo.cli.errors import one_line_errors
from softgrpo.config import Config
from softgrpo.config.rollout import FillerConfig
from softgrpo.config.sections import DataConfig

if TYPE_CHECKING:
    from softgrpo.evaluation.folder import Settings
    from softgrpo.evaluation.tasks import Task

Number = TypeVar("Number", int, float)

EPILOG = """\
tasks: aime24 aime25 amc23 math500 gsm8k gpqa_diamond humaneval mbpp (from the hub, or NAME=FILE
with the same columns), reasoning_gym:NAME?key=value&..., or a file with prompt and answer.
example: softgrpo-eval --model runs/demo/model --recipe demo --samples 16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-eval``; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        with one_line_errors(parser.prog, "interrupted; the same command goes on"):
            if arguments.compare:
                _compare(arguments)
            else:
                _evaluate(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softgrpo-eval",
        description="Evaluate a model with soft and discrete tokens at the same temperatures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="directory, hub id or alias (%(default)s)")
    add(
        "--task",
        action="append",
        metavar="T[,T...]",
        help="see below (held-out data of the recipe)",
    )
    add("--mode", help="soft, discrete or both (both; discrete with filler thoughts)")
    add(
        "--thoughts",
        metavar="KIND",
        help="own; argmax: the heaviest candidate alone of each mixture; filler:N: N tokens in the "
        "place of thoughts (as in the recipe, else own)",
    )
    add("--temperature", default="1.0", metavar="T[,T...]", help="of both modes (%(default)s)")
    add("--samples", type=int, default=32, metavar="N", help="of each question (%(default)s)")
    add("--k", metavar="K[,K...]", help="which pass@k the table shows (N)")
    add("--max-tokens", type=int, help="most new tokens (those of the recipe, else 4096)")
    add("--top-k", type=int, help="candidates of both modes (the model's own, else 5)")
    add("--top-p", type=float, help="nucleus of both modes (the model's own, else 0.95)")
    add("--tau", type=float, help="temperature of the mixture (the model's own, else 0.1)")
    add("--max-soft-tokens", type=int, help="thinking budget (the model's own, else none)")
    add("--min-soft-tokens", type=int, help="least thinking (the model's own, else 0)")
    add_entropy_rules(parser)
    add("--seed", type=int, default=0, help="the same seed gives the same samples (%(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--recipe", metavar="RECIPE_OR_FILE", help="ask as this training recipe or run does")
    add("--output", type=Path, metavar="DIR", help="default: runs/eval/MODEL-SETTINGS")
    add("--engine", default="native", help="native, vllm, hf or an installed one (%(default)s)")
    add("--dtype", default="bfloat16", help="bfloat16 or float32 (%(default)s)")
    add("--batch-size", type=int, default=256, help="samples in progress (%(default)s)")
    add("--batch-invariant", action="store_true", help="the same bits at any batch size, on a CPU")
    add("--estimator", choices=("unbiased", "prefix"), default="unbiased", help="of pass@k")
    add("--allow-code-execution", action="store_true", help="run programs that the model writes")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results: paired A - B")
    return parser


def _compare(arguments: argparse.Namespace) -> None:
    from softgrpo.evaluation.results import compare_results, read_results
    from softgrpo.evaluation.table import print_comparison

    ours, theirs = (read_results(path) for path in arguments.compare)
    ks = _numbers(arguments.k, int, "--k") if arguments.k else None
    print_comparison(compare_results(ours, theirs, arguments.estimator), ks)


def _evaluate(arguments: argparse.Namespace) -> None:
    from softgrpo.evaluation.thoughts import modes_of, parse_thoughts

    ks = _table_ks(arguments)
    recipe = _recipe(arguments)
    data = recipe.data if recipe else DataConfig()
    of_recipe = recipe.rollout.filler_thoughts if recipe else FillerConfig()
    thoughts, filler = parse_thoughts(arguments.thoughts, of_recipe)
    arguments.modes = modes_of(thoughts, arguments.mode)
    tasks = _tasks(arguments, data)
    # Heavy imports come after the tasks are known to be good.
    from transformers import AutoTokenizer

    from softgrpo.data.prompts import filler_thoughts
    from softgrpo.evaluation.folder import EvalFolder
    from softgrpo.evaluation.page import write_page
    from softgrpo.evaluation.results import build_results
    from softgrpo.evaluation.run import cells_to_do, encode_tasks, run_cells
    from softgrpo.evaluation.table import print_results
    from softgrpo.log.files import write_atomically
    from softgrpo.rollout.engines import load_engine
    from softgrpo_engine.model.source import resolve_model

    model = resolve_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    settings = _settings(arguments, model, tasks, data, thoughts, filler)
    fillers = filler_thoughts(filler, settings.soft["end_of_thinking"], tokenizer)
    prompts = encode_tasks(tasks, tokenizer, data, fillers)
    folder = EvalFolder(arguments.output or _default_output(settings), settings)
    try:
        cells = cells_to_do(settings, tasks, folder.rows())
        if cells:
            longest = max(len(ids) for questions in prompts.values() for ids in questions)
            llm = load_engine(settings.engine)(
                model,
                tokenizer=tokenizer,
                dtype=settings.dtype,
                max_model_len=longest + settings.max_tokens,
                max_batch_size=arguments.batch_size,
                **({"batch_invariant": True} if settings.batch_invariant else {}),
            )
            run_cells(llm, settings, cells, prompts, folder)
        graders = {task.name: task.grader for task in tasks}
        results = build_results(folder.rows(), settings, graders, arguments.estimator)
        write_atomically(folder.results, json.dumps(results, ensure_ascii=False) + "\n")
        write_page(folder, results)
    finally:
        folder.close()
    print_results(results, ks)
    print(f"results  {folder.results}")
    print(f"report   {folder.report}")


def _recipe(arguments: argparse.Namespace) -> Config | None:
    """The recipe, which also fills in --max-tokens and --task where they are not given."""
    recipe = Config.load(arguments.recipe) if arguments.recipe else None
    if arguments.max_tokens is None:
        arguments.max_tokens = recipe.rollout.max_new_tokens if recipe else 4096
    if not arguments.task and recipe and recipe.data.eval:
        # The questions that training holds out; later ones of the same data may be in it.
        arguments.task, size = [recipe.data.eval], recipe.data.eval_size
        arguments.limit = size if arguments.limit is None else min(size, arguments.limit)
    return recipe


def _tasks(arguments: argparse.Namespace, data: DataConfig) -> list[Task]:
    from softgrpo.evaluation.tasks import BENCHMARKS, load_task, split_names, task_names

    specs = [name for text in arguments.task or [] for name in split_names(text)]
    if not specs:
        raise ValueError(f"give --task: {', '.join(BENCHMARKS)}, reasoning_gym:NAME, or a file")
    code = [n for n in task_names(specs) if n in BENCHMARKS and BENCHMARKS[n].grader == "code"]
    if code and not arguments.allow_code_execution:
        raise ValueError(
            f"{code[0]} runs programs that the model writes (shut in, without a network): allow it "
            "with --allow-code-execution"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} is not allowed: must be >= 1")
    tasks = [load_task(spec, data, arguments.limit) for spec in specs]
    if code:
        from softgrpo.evaluation.sandbox import passes

        passes("pass")  # raises where programs cannot be shut in
    return tasks


def _settings(
    arguments: argparse.Namespace,
    model: Path,
    tasks: Sequence[Task],
    data: DataConfig,
    thoughts: str,
    filler: FillerConfig,
) -> Settings:
    from softgrpo.evaluation.folder import Settings, model_digest
    from softgrpo.evaluation.run import sampling
    from softgrpo_engine import SoftParams

    base = SoftParams.of_model(model) or SoftParams()
    names = ("top_k", "top_p", "tau", "max_soft_tokens", "min_soft_tokens", *ENTROPY_RULES)
    given = {name: getattr(arguments, name) for name in names}
    changes = {name: value for name, value in given.items() if value is not None}
    soft = dataclasses.replace(base, **changes).to_dict()
    del soft["temperature"]
    settings = Settings(
        model=arguments.model,
        engine=arguments.engine,
        dtype=arguments.dtype,
        batch_invariant=arguments.batch_invariant,
        tasks=[task.name for task in tasks],
        modes=arguments.modes,
        temperatures=list(dict.fromkeys(_numbers(arguments.temperature, float, "--temperature"))),
        samples=arguments.samples,
        max_tokens=arguments.max_tokens,
        limit=arguments.limit,
        seed=arguments.seed,
        soft=soft,
        thoughts=thoughts,
        filler_thoughts=dataclasses.asdict(filler),
        system_prompt=data.system_prompt,
        few_shot=[dataclasses.asdict(shot) for shot in data.few_shot],
        prompt_template=data.prompt_template,
        questions={task.name: task.digest() for task in tasks},
        model_files=model_digest(model),
    )
    for mode in settings.modes:
        for temperature in settings.temperatures:
            sampling(settings, mode, temperature)  # raises for a value that is not allowed
    return settings


def _default_output(settings: Settings) -> Path:
    """The same for the same settings; a run's `runs/NAME/model` goes by its NAME."""
    path = Path(settings.model)
    name = path.parent.name if path.name == "model" else path.name
    return Path("runs/eval") / f"{name}-{settings.digest()}"


def _table_ks(arguments: argparse.Namespace) -> list[int]:
    """The k of pass@k in the table; raises ValueError unless each is in 1..n."""
    n = arguments.samples
    if n < 1:
        raise ValueError(f"--samples {n} is not allowed: must be >= 1")
    ks = _numbers(arguments.k, int, "--k") if arguments.k else [n]
    for k in ks:
        if not 1 <= k <= n:
            raise ValueError(f"--k {k} is not allowed: pass@k needs 1 <= k <= --samples ({n})")
    return ks


def _numbers(text: str, kind: type[Number], flag: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not a list of numbers such as 1,8") from None


if __name__ == "__main__":
    sys.exit(main())
