"""Generates and grades what a folder does not hold yet."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from softgrpo.config.sections import DataConfig
from softgrpo.data.prompts import build_prompt
from softgrpo.data.sources import DataError
from softgrpo.evaluation.folder import EvalFolder, Settings
from softgrpo.evaluation.graders import Grade, Grader
from softgrpo.evaluation.tasks import Task
from softgrpo.log.samples import Mixture, position_rows
from softgrpo.rollout.engines import RolloutEngine
from softgrpo.rollout.sampling import EVALUATION_STREAM
from softgrpo_engine import Output, Sample, SamplingParams, SoftParams
from softgrpo_engine.requests.admission import check_thoughts_fit
from softgrpo_engine.requests.progress import TokenRate, sample_progress
from softgrpo_engine.requests.prompts import default_uids
from softgrpo_kernels import soft_weights
from softgrpo_kernels.methods import method_of


@dataclass(frozen=True)
class Cell:
    """One task in one mode at one temperature, and the questions of it that are left."""

    task: Task
    mode: str
    temperature: float
    todo: list[int]


def cells_to_do(settings: Settings, tasks: Sequence[Task], rows: Sequence[Any]) -> list[Cell]:
    """The grid tasks x modes x temperatures without what `rows` hold."""
    done = {(r["task"], r["mode"], r["temperature"], r["question"]) for r in rows}
    grid = itertools.product(tasks, settings.modes, settings.temperatures)
    cells = []
    for task, mode, t in grid:
        questions = range(len(task.examples))
        todo = [q for q in questions if (task.name, mode, t, q) not in done]
        if todo:
            cells.append(Cell(task, mode, t, todo))
    return cells


def sampling(
    settings: Settings, mode: str, temperature: float
) -> tuple[SamplingParams, SoftParams | None]:
    """What the engine is asked for; both modes at the same temperature, top_k and top_p."""
    soft = SoftParams.from_dict({**settings.soft, "temperature": temperature or 1.0})
    params = SamplingParams(
        temperature=temperature,
        top_p=soft.top_p,
        top_k=soft.top_k,
        max_tokens=settings.max_tokens,
    )
    if mode == "discrete":
        return params, None
    if temperature == 0:
        raise ValueError("temperature 0 has no soft mode: it is for --mode discrete")
    check_thoughts_fit(params, soft)
    return params, _argmax(soft) if settings.thoughts == "argmax" else soft


def _argmax(soft: SoftParams) -> SoftParams:
    """The same draws, of which one token alone is fed: the heaviest candidate, as nothing else
    reaches a floor of 1, or the drawn token where the method draws one."""
    if method_of(soft.noise).draws_token:
        return dataclasses.replace(soft, noise="multiplex", noise_scale=1.0, tau=1.0)
    return dataclasses.replace(soft, weight_floor=1.0)


def encode_tasks(
    tasks: Sequence[Task], tokenizer: Any, data: DataConfig, filler: Sequence[int] = ()
) -> dict[str, list[list[int]]]:
    """Token ids of every question, by task name; raises DataError naming the question.

    filler: see `build_prompt`.
    """
    prompts: dict[str, list[list[int]]] = {}
    for task in tasks:
        prompts[task.name] = []
        for i, example in enumerate(task.examples):
            try:
                ids = build_prompt(example, tokenizer, data.system_prompt, data.few_shot, filler)
            except DataError as error:
                raise DataError(f"{task.name}, question {i}: {error}") from None
            prompts[task.name].append(ids)
    return prompts


def run_cells(
    llm: RolloutEngine,
    settings: Settings,
    cells: Sequence[Cell],
    prompts: dict[str, list[list[int]]],
    folder: EvalFolder,
) -> None:
    """Generates and grades the cells; a question is in the folder as soon as it is graded.

    prompts: token ids of every question by task name. Grading goes on in the background while the
    next questions are generated.
    """
    graders = {kind: Grader(kind) for kind in {cell.task.grader for cell in cells}}
    background = ThreadPoolExecutor(1)
    try:
        for number, cell in enumerate(cells, 1):
            left, label = len(cell.todo), f"{cell.task.label} {cell.mode} T {cell.temperature:g}"
            print(f"[{number}/{len(cells)}] {label}: {left} questions", file=sys.stderr)
            grader, graded = graders[cell.task.grader], []
            for index, output, seconds in _generate(llm, settings, cell, prompts):
                job = (llm, settings, cell, index, output, seconds, grader, folder)
                graded.append(background.submit(_finish, *job))
                while graded and graded[0].done():
                    graded.pop(0).result()  # an error ends the run now, not after the last token
            for future in graded:
                future.result()
    finally:
        background.shutdown(cancel_futures=True)
        for grader in graders.values():
            grader.close()


def _generate(
    llm: RolloutEngine, settings: Settings, cell: Cell, prompts: dict[str, list[list[int]]]
) -> Iterator[tuple[int, Output, float]]:
    """(question, output, seconds since the one before), as groups end."""
    params, soft = sampling(settings, cell.mode, cell.temperature)
    ids = [prompts[cell.task.name][index] for index in cell.todo]
    # Named by their prompt alone: a sample does not depend on what else is evaluated, and both
    # modes see the same noise.
    uids = [default_uids(prompt, settings.samples) for prompt in ids]
    with sample_progress(sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(ids) * settings.samples, rate=0.0)
        rate = TokenRate()
        groups = llm.iter_groups(
            zip(ids, uids, strict=True),
            params,
            soft or False,
            seed=settings.seed,
            stream=EVALUATION_STREAM,
            between_steps=lambda: bar.update(task, rate=rate.recent),
        )
        before = time.perf_counter()
        for i, output in groups:
            bar.advance(task, len(output.samples))
            now = time.perf_counter()
            rate.add(sum(len(s.token_ids) for s in output.samples), now - before)
            yield cell.todo[i], output, now - before
            before = now


def _finish(
    llm: RolloutEngine,
    settings: Settings,
    cell: Cell,
    index: int,
    output: Output,
    seconds: float,
    grader: Grader,
    folder: EvalFolder,
) -> None:
    """Grades one question and writes its line."""
    example = cell.task.examples[index]
    grades = grader.grade(example, [sample.text for sample in output.samples])
    _, soft = sampling(settings, cell.mode, cell.temperature)
    mixture = soft.mixture if soft else (1.0, 0.0)
    pairs = zip(output.samples, grades, strict=True)
    shown = [
        {"sample": i, "positions": position_rows(output.samples[i].soft, mixture, llm.tokenizer)}
        for i in shown_samples(grades)
    ]
    folder.append(
        {
            "task": cell.task.name,
            "mode": cell.mode,
            "temperature": cell.temperature,
            "question": index,
            "prompt": example.text,
            "gold": example.answer,
            "seconds": round(seconds, 4),
            "samples": [_sample_row(sample, grade, mixture) for sample, grade in pairs],
            "shown": shown,
        }
    )


def shown_samples(grades: Sequence[Grade]) -> list[int]:
    """Those whose candidates are kept for the page: the first right one and the first wrong one."""
    correct = [grade.correct for grade in grades]
    return sorted(correct.index(value) for value in (True, False) if value in correct)


def _sample_row(sample: Sample, grade: Grade, mixture: Mixture) -> dict[str, Any]:
    record = sample.soft
    soft = record.kind == 1
    weights = soft_weights(record.gprime, record.kind, *mixture)[soft]
    effective = float((1 / weights.square().sum(-1)).mean()) if bool(soft.any()) else None
    return {
        "text": sample.text,
        "answer": grade.answer,
        "score": grade.score,
        "correct": grade.correct,
        "tokens": len(sample.token_ids),
        "soft": int(soft.sum()),
        "effective_candidates": effective and round(effective, 4),
        "finish_reason": sample.finish_reason,
        "uid": sample.uid,
    }
