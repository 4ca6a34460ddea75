"""Loaders on small files in exactly the columns of the published datasets."""

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from softgrpo.config.sections import DataConfig, FewShot
from softgrpo.data.sources import DataError
from softgrpo.evaluation.tasks import BENCHMARKS, load_task, split_names, task_label, task_names
from softgrpo.evaluation.thoughts import modes_of

AIME24 = {
    "id": 60,
    "problem": "Every morning Aya goes for a walk.",
    "solution": "...",
    "answer": "204",
    "url": "https://artofproblemsolving.com",
    "year": "2024",
}
AIME25 = {"id": "0", "problem": "Find the sum of all bases.", "answer": "70", "solution": "..."}
AMC23 = {"id": 0, "question": "Cities A and B are 45 miles apart.", "answer": "27.0", "url": ""}
MATH500 = {
    "problem": "Convert the point $(0,3)$ to polar coordinates.",
    "solution": "...",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
GSM8K = {
    "question": "How much does she make every day?",
    "answer": "She sells 9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 1,018",
}
GPQA = {
    "Record ID": "rec06",
    "Question": "Which state is longer lived?",
    "Correct Answer": "the first\n",
    "Incorrect Answer 1": "the second",
    "Incorrect Answer 2": "the third",
    "Incorrect Answer 3": "neither",
    "High-level domain": "Physics",
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """ Twice x. """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "double",
}
MBPP = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find the shared elements.",
    "code": "...",
    "test_imports": ["import math"],
    "test_list": ["assert shared((1, 2), (2, 3)) == (2,)", "assert math.pi > 3"],
}
ROWS = {
    "aime24": AIME24,
    "aime25": AIME25,
    "amc23": AMC23,
    "math500": MATH500,
    "gsm8k": GSM8K,
    "gpqa_diamond": GPQA,
    "humaneval": HUMANEVAL,
    "mbpp": MBPP,
}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_loads_from_a_file_of_its_columns(tmp_path, name, suffix):
    task = load_task(f"{name}={write(tmp_path / f'x{suffix}', [ROWS[name]] * 3)}", limit=2)
    assert (task.name, task.label, len(task.examples)) == (name, name, 2)
    example = task.examples[0]
    gold = {
        "aime24": "204",
        "aime25": "70",
        "amc23": "27.0",
        "math500": MATH500["answer"],
        "gsm8k": "1018",
        "humaneval": "",
        "mbpp": "",
    }
    if name in gold:
        assert example.answer == gold[name]
    question = ROWS[name].get("problem") or ROWS[name].get("question") or ROWS[name].get("prompt")
    assert (question or GPQA["Question"]).strip() in example.prompt
    assert ("```python" if task.grader == "code" else "\\boxed{}") in example.prompt


def test_choices_are_in_an_order_of_their_own_with_the_right_letter(tmp_path):
    rows = [{**GPQA, "Question": f"Question {i}?"} for i in range(60)]
    task = load_task(f"gpqa_diamond={write(tmp_path / 'g.jsonl', rows)}")
    assert task.grader == "choice"
    for example in task.examples:
        assert f"{example.answer}) the first\n" in example.prompt
        assert all(choice in example.prompt for choice in ("the second", "the third", "neither"))
    letters = [example.answer for example in task.examples]
    assert all(5 <= letters.count(letter) <= 28 for letter in "ABCD")
    again = load_task(f"gpqa_diamond={tmp_path / 'g.jsonl'}")
    assert again.digest() == task.digest()


def test_code_tasks_carry_their_tests(tmp_path):
    (example,) = load_task(f"humaneval={write(tmp_path / 'h.jsonl', [HUMANEVAL])}").examples
    assert example.columns["tests"].endswith("assert candidate(3) == 6\n\ncheck(double)")
    (example,) = load_task(f"mbpp={write(tmp_path / 'm.jsonl', [MBPP])}").examples
    assert example.columns["tests"].splitlines()[0] == "import math"
    assert MBPP["test_list"][0] in example.prompt


def test_files_of_prompt_and_answer(tmp_path):
    file = write(tmp_path / "mine.jsonl", [{"prompt": "1+1?", "answer": 2, "x": "y"}])
    task = load_task(str(file))
    assert (task.label, task.grader, task.examples[0].answer) == ("mine", "math", "2")
    assert task.examples[0].prompt == "1+1?"


@pytest.mark.demo
def test_reasoning_gym_and_worked_examples():
    spec = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&size=5"
    task = load_task(spec, limit=3)
    assert (task.name, task.label, len(task.examples)) == (spec, "chain_sum", 3)
    assert task.examples[2].columns == {"spec": spec, "index": 2}
    assert task.examples[0].prompt.endswith("\\boxed{}.")
    asked = load_task(spec, DataConfig(prompt_template="What is {expression}?")).examples
    assert asked[0].prompt.startswith("What is ")
    assert "boxed" not in asked[0].prompt
    shot = FewShot(asked[0].prompt, "its answer stands in the prompt")
    data = DataConfig(prompt_template="What is {expression}?", few_shot=[shot])
    assert load_task(spec, data, limit=2).examples == asked[1:3]


def test_hub_ids_configs_and_splits(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return iter([ROWS[current]])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for current in BENCHMARKS:
        assert len(load_task(current).examples) == 1
    assert asked == [
        ("HuggingFaceH4/aime_2024", "train"),
        ("yentinglin/aime_2025", "train"),
        ("math-ai/amc23", "test"),
        ("HuggingFaceH4/MATH-500", "test"),
        ("openai/gsm8k", "main", "test"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        ("openai/openai_humaneval", "test"),
        ("google-research-datasets/mbpp", "sanitized", "test"),
    ]


def test_the_digest_changes_with_a_question_and_with_an_answer(tmp_path):
    rows = [{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "#### 2"}]
    digests = set()
    for i, change in enumerate([{}, {"question": "c"}, {"answer": "#### 3"}]):
        path = write(tmp_path / f"{i}.jsonl", [rows[0], {**rows[1], **change}])
        digests.add(load_task(f"gsm8k={path}").digest())
    assert len(digests) == 3


def test_lists_of_names():
    gym = "reasoning_gym:x?sizes=[1,2]&y={a: 1, b: 2}"
    assert split_names(f"gsm8k, aime24,{gym},b.jsonl") == ["gsm8k", "aime24", gym, "b.jsonl"]
    assert task_names(["gsm8k=a.jsonl", "x/y=z.jsonl"]) == ["gsm8k", "x/y=z.jsonl"]
    assert task_label("reasoning_gym:chain_sum?size=3") == "chain_sum"
    with pytest.raises(DataError, match="'gsm8k' is given twice"):
        task_names(["gsm8k", "gsm8k=other.jsonl"])


def test_errors_name_the_thing_and_the_remedy(tmp_path, monkeypatch):
    file = write(tmp_path / "f.jsonl", [{"query": "?", "answer": "#### 1"}])
    with pytest.raises(DataError, match=r"no column 'question'; gsm8k needs question, answer; col"):
        load_task(f"gsm8k={file}")
    with pytest.raises(DataError, match=r"no task 'gsm8'; did you mean 'gsm8k'"):
        load_task("gsm8")
    with pytest.raises(DataError, match=r"no task 'zebra'; there are: aime24, .*or reason"):
        load_task("zebra")
    with pytest.raises(DataError, match=r"no such file: .*none\.jsonl"):
        load_task(f"gsm8k={tmp_path / 'none.jsonl'}")
    with pytest.raises(DataError, match=r"gsm8k=x\.csv: give a \.jsonl"):
        load_task("gsm8k=x.csv")
    gold = write(tmp_path / "gold.jsonl", [{"prompt": "?", "answer": " "}])
    with pytest.raises(DataError, match="example 0: the answer is empty"):
        load_task(str(gold))
    empty = write(tmp_path / "e.jsonl", [])
    with pytest.raises(DataError, match="is empty"):
        load_task(f"gsm8k={empty}")
    void = write(tmp_path / "v.jsonl", [{"question": "?", "answer": "no number ####"}])
    with pytest.raises(DataError, match="example 0: the answer is empty"):
        load_task(f"gsm8k={void}")
    null = write(tmp_path / "n.jsonl", [{"question": None, "answer": "#### 1"}])
    with pytest.raises(DataError, match="is not text"):
        load_task(f"gsm8k={null}")

    def offline(*names, split):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    remedy = r"Couldn't reach the Hub.*from a file: --task gsm8k=FILE, columns question, ans"
    with pytest.raises(DataError, match=remedy):
        load_task("gsm8k")


def test_modes_by_their_names():
    assert modes_of("own", None) == modes_of("own", "both") == ["soft", "discrete"]
    assert modes_of("filler", None) == ["discrete"]
    assert modes_of("own", "discrete, soft") == ["discrete", "soft"]
    with pytest.raises(ValueError, match="--mode 'hard' is not allowed: must be soft, discrete or"):
        modes_of("own", "hard")
