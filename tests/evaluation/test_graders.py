"""Graders on right, wrong, odd and hanging answers; programs stay shut in."""

import dataclasses
import time

import pytest

from softgrpo.data.examples import Example
from softgrpo.evaluation.graders import Grade, Grader, choice_letter, code_program
from softgrpo.evaluation.sandbox import passes


@pytest.fixture(scope="module")
def math_grader():
    grader = Grader("math", workers=1)
    yield grader
    grader.close()


def test_mathematics_by_value_not_by_text(math_grader):
    texts = [
        "so \\boxed{\\frac{1}{2}}",
        "\\boxed{0.5}",
        "\\boxed{2} no, \\boxed{1/2}",
        "\\boxed{\\frac{1}{3}}",
        "the answer is 1/2",
        "\\boxed{1/2",
    ]
    grades = math_grader.grade(Example("?", "\\frac12", {}), texts)
    assert [grade.correct for grade in grades] == [True, True, True, False, False, False]
    assert grades[0].answer == grades[2].answer == "1/2"
    assert [grade.answer for grade in grades[4:]] == [None, None]


def test_tuples_and_words_of_math500(math_grader):
    point = Example("?", "\\left( 3, \\frac{\\pi}{2} \\right)", {})
    right = math_grader.grade(point, ["\\boxed{(3, \\pi/2)}", "\\boxed{(3, \\pi)}"])
    assert [grade.correct for grade in right] == [True, False]
    name = Example("?", "\\text{Evelyn}", {})
    right = math_grader.grade(name, ["\\boxed{\\text{Evelyn}}", "\\boxed{\\text{Carla}}"])
    assert [grade.correct for grade in right] == [True, False]


def test_an_answer_that_hangs_is_lost_and_the_next_is_graded(math_grader, monkeypatch):
    runner = math_grader._runner
    example = Example("?", "7", {})
    with monkeypatch.context() as patched:
        patched.setattr(runner, "config", dataclasses.replace(runner.config, timeout_s=1.5))
        (grade,) = math_grader.grade(example, ["\\boxed{9^{9^{9^{9^{9^{9}}}}}!}"])
    assert grade.score is None
    assert not grade.correct
    assert math_grader.grade(example, ["\\boxed{7}"]) == [Grade(1.0, "7")]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("A or C? \\boxed{\\text{(C)}}", "C"),
        ("\\boxed{D) the second}", "D"),
        ("\\boxed{A or B}", None),
        ("\\boxed{the second}", None),
        ("The answer is (C). Or is the answer: **d**?", "D"),
        ("answer is A", "A"),
        ("I like B", None),
        ("the answer is Definitely", None),
    ],
)
def test_letter_of_a_choice(text, letter):
    assert choice_letter(text) == letter


def test_choice_grades():
    grader = Grader("choice")
    grades = grader.grade(Example("?", "B", {}), ["\\boxed{B}", "\\boxed{C}", "hm"])
    assert grades == [Grade(1.0, "B"), Grade(0.0, "C"), Grade(0.0, None)]
    grader.close()


@pytest.mark.demo
def test_reasoning_gym_uses_the_scorer_of_the_task():
    spec = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=4&max_digits=4&size=3"
    from softgrpo.data.sources import reasoning_gym_dataset

    gold = reasoning_gym_dataset(spec)[1]["answer"]
    grader = Grader("reasoning_gym", workers=1)
    try:
        example = Example("?", gold, {"spec": spec, "index": 1})
        boxes = [gold, f"{int(gold)}.00", f"{gold} apples", "1"]
        texts = [f"\\boxed{{{box}}}" for box in boxes]
        grades = grader.grade(example, [*texts, gold])
    finally:
        grader.close()
    assert [grade.correct for grade in grades] == [True, True, False, False, False]
    assert [grade.answer for grade in grades] == [*boxes, None]


HUMANEVAL = {
    "header": 'import math\n\ndef double(x):\n    """ Twice x. """\n',
    "entry_point": "double",
    "tests": "def check(f):\n    assert f(3) == 6\n\ncheck(double)",
}


def test_programs_are_the_last_block_or_the_body():
    whole = (
        "Think.\n```python\nx = 1\n```\nBetter:\n```python\ndef double(x):\n    return 2 * x\n```"
    )
    assert code_program(whole, HUMANEVAL).startswith("def double(x):\n    return 2 * x\n")
    body = code_program("    return 2 * x\n", HUMANEVAL)
    assert body.startswith(HUMANEVAL["header"] + "    return 2 * x\n")
    cut = code_program("```python\ndef double(x):\n    return 2 *", HUMANEVAL)
    assert cut.startswith("def double(x):\n    return 2 *\n")


def test_code_grades():
    grader = Grader("code")
    block = "```python\ndef double(x):\n    return {}\n```"
    texts = [block.format("2 * x"), block.format("x + 2"), "    return x + x\n", "nonsense ("]
    grades = grader.grade(Example("?", "", HUMANEVAL), texts)
    grader.close()
    assert [grade.correct for grade in grades] == [True, False, True, False]
    assert {grade.answer for grade in grades} == {None}


REFUSED = "except PermissionError:\n    pass\nelse:\n    raise ValueError"


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("print('x' * 10**6)", True),
        ("import threading; t = threading.Thread(target=int); t.start(); t.join()", True),
        (f"import socket\ntry:\n    socket.socket()\n{REFUSED}", True),
        (f"import os\ntry:\n    os.fork()\n{REFUSED}", True),
        (f"import subprocess\ntry:\n    subprocess.run(['true'])\n{REFUSED}", True),
        (f"import os\ntry:\n    os.kill(os.getppid(), 9)\n{REFUSED}", True),
        (f"import signal\ntry:\n    signal.raise_signal(15)\n{REFUSED}", True),
        ("x = bytearray(3 * 2**30)", False),
        ("f = open('x', 'wb')\nfor _ in range(20): f.write(bytes(2**20))", False),
        ("import time; time.sleep(100)", False),
        ("while True: pass", False),
    ],
)
def test_programs_are_shut_in(program, passed):
    start = time.monotonic()
    assert passes(program, wall_seconds=20.0 if passed else 1.0) is passed
    assert time.monotonic() - start < 10


def test_processor_time_is_bounded_whatever_the_wall_time():
    """The limit that the child sets itself, seen from inside."""
    program = (
        "lines = open('/proc/self/limits').read().splitlines()\n"
        "(cpu,) = [line.split() for line in lines if line.startswith('Max cpu time')]\n"
        "assert cpu[3:5] == ['10', '10']"
    )
    assert passes(program)
