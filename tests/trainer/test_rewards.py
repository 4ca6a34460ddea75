"""A runner that survives every reward function."""

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch

from softgrpo.config.sections import RewardConfig, RewardFunction
from softgrpo.data.examples import Example
from softgrpo.data.prompts import Prompt
from softgrpo.rewards import (
    RewardError,
    RewardRunner,
    apply_require_eos,
)
from softgrpo.rewards.runner import _WORKER_PROGRAM
from softgrpo.rewards.worker import RewardCall

FUNCTIONS = """
import asyncio, os, time

def length(prompts, completions, **columns):
    return [len(c) for c in completions]

def moody(prompts, completions, answer, **columns):
    for text in completions:
        if text == "hang":
            time.sleep(1000)
        if text == "crash":
            os._exit(3)
    return [float(text == gold) for text, gold in zip(completions, answer)]

def raises(prompts, completions, **columns):
    return [1.0 / (len(c) - 3) for c in completions]

def short(prompts, completions, **columns):
    return [1.0]

def infinite(prompts, completions, **columns):
    return [float("inf") for _ in completions]

def nothing(prompts, completions, **columns):
    return None

def sometimes(prompts, completions, level, **columns):
    return [None if value is None else 10 * value for value in level]

async def judge(prompts, completions, **columns):
    async def one(text):
        await asyncio.sleep(0.05)
        if text == "hang":
            await asyncio.sleep(1000)
        return len(text)
    return await asyncio.gather(*map(one, completions))

def tokens(completion_ids, **columns):
    return [ids[0] for ids in completion_ids]

def process(prompts, completions, **columns):
    return [os.getpid() for _ in completions]

not_callable = 3
"""


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def runner(functions):
    """Makes runners of named functions and ends their workers."""
    made = []

    def make(*names, **settings):
        paths = [name if "." in name else f"{functions}:{name}" for name in names]
        config = RewardConfig(functions=[RewardFunction(path) for path in paths], **settings)
        made.append(RewardRunner(config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def call(*completions, **columns):
    ids = [[ord(character) for character in text] for text in completions]
    return RewardCall(["q"] * len(completions), list(completions), ids, columns)


# --- the runner -------------------------------------------------------------------------------


def test_functions_by_dotted_path_and_by_file(runner):
    both = runner("softgrpo.rewards.math_reward", "length")
    rewards = both.rewards(call(r"\boxed{7}", "seven", answer=["7", "7"]))
    assert rewards == {"math_reward": [1.0, 0.0], "length": [9.0, 5.0]}
    assert both.lost == 0


def test_a_module_in_the_working_directory_is_found(functions, runner, monkeypatch):
    monkeypatch.chdir(functions.parent)
    assert runner("my_rewards.length").rewards(call("abc")) == {"length": [3.0]}


def test_math_reward_is_fast_on_one_worker(runner):
    math = runner("softgrpo.rewards.math_reward")
    texts = [f"{i} + 1 = {i + 1}\n\\boxed{{{i + 1}}}" for i in range(64)]
    batch = call(*texts, answer=[str(i + 1) for i in range(64)])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert sum(math.rewards(batch)["math_reward"]) == 64
        times.append(time.perf_counter() - start)
    # Through sympy it takes seconds; other tests share the cores.
    assert min(times) < 0.3


@pytest.mark.parametrize("workers", [1, 2])
def test_hanging_and_crashing_samples_are_lost_alone(runner, workers):
    moody = runner("moody", timeout_s=0.5, workers=workers)
    batch = call("a", "hang", "b", "crash", "c", answer=["a", "b", "b", "c", "x"])
    assert moody.rewards(batch) == {"moody": [1.0, None, 1.0, None, 0.0]}
    assert moody.lost == 2
    assert moody.rewards(call("a", answer=["a"])) == {"moody": [1.0]}  # and it goes on


def test_a_hanging_sympy_call_is_killed(runner):
    math = runner("softgrpo.rewards.math_reward", timeout_s=1.5)
    batch = call(r"\boxed{9^{9^{9^{9}}}}", r"\boxed{7}", answer=["7", "7"])
    assert math.rewards(batch) == {"math_reward": [None, 1.0]}
    assert math.lost == 1


def test_a_batch_is_split_among_the_workers(runner):
    pids = runner("process", workers=2).rewards(call(*"abcde"))["process"]
    assert len(set(pids)) == 2
    assert pids[0] == pids[1] != pids[2] == pids[4]
    assert os.getpid() not in pids
    assert runner("process", workers=2).rewards(call()) == {"process": []}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "raises",
            "reward function 'raises' raised ZeroDivisionError: float division by zero "
            "(my_rewards.py:16), on completion 'abc'",
        ),
        ("short", "reward function 'short' returned 1 rewards for 2 completions"),
        ("infinite", "reward function 'infinite' returned inf for completion 'x'"),
        ("nothing", "reward function 'nothing' must return a list of numbers or None, got None"),
        ("sometimes", "reward function 'sometimes' raised TypeError: sometimes() missing 1"),
    ],
)
def test_a_wrong_reward_function_is_one_clear_line(runner, functions, name, expected):
    batch = call("x", "abc")
    with pytest.raises(RewardError) as in_worker:
        runner(name).rewards(batch)
    assert str(in_worker.value).startswith(expected)
    assert "\n" not in str(in_worker.value)
    namespace = {}
    exec(compile(FUNCTIONS, "my_rewards.py", "exec"), namespace)
    with pytest.raises(RewardError) as in_process:
        RewardRunner(RewardConfig(), [namespace[name]]).rewards(batch)
    assert str(in_process.value).startswith(expected)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "nope.rewards.f",
            "cannot import reward function 'nope.rewards.f': No module named 'nope'",
        ),
        ("softgrpo.rewards.f", "reward function 'softgrpo.rewards.f': there is no function 'f'"),
        ("FILE:not_callable", "there is no function 'not_callable'"),
        ("nope.py:f", "reward function 'nope.py:f': no such file: nope.py"),
        ("f", "reward function 'f': give package.module.function or file.py:function"),
    ],
)
def test_a_function_that_cannot_be_loaded_fails_at_once(functions, path, expected):
    path = path.replace("FILE", str(functions))
    with pytest.raises(RewardError) as error:
        RewardRunner(RewardConfig(functions=[RewardFunction(path)]))
    assert expected in str(error.value)


def test_function_names_must_differ(functions):
    paths = ["softgrpo.rewards.math_reward", f"{functions}:math_reward"]
    with pytest.raises(RewardError, match="need different names"):
        RewardRunner(RewardConfig(functions=[RewardFunction(path) for path in paths]))


def test_callables_run_in_this_process():
    seen = []

    def count(prompts, completions, **columns):
        seen.append((prompts, columns))
        return [float(len(seen))] * len(completions)

    assert RewardRunner(RewardConfig(), [count]).rewards(call("a", level=[1])) == {"count": [1.0]}
    assert seen == [(["q"], {"level": [1], "completion_ids": [[97]]})]


SCRIPT = """
import sys, time
from softgrpo.config.sections import RewardConfig, RewardFunction
from softgrpo.rewards import RewardRunner
from softgrpo.rewards.worker import RewardCall
runner = RewardRunner(RewardConfig(functions=[RewardFunction(sys.argv[1])], timeout_s=60))
print(runner._workers[0]._process.pid, flush=True)
runner.rewards(RewardCall(["q"], ["hang"], [[0]], {"answer": ["a"]}))
"""


def test_a_hanging_worker_ends_with_a_killed_run(functions, tmp_path):
    # A script without a main guard, killed while its worker hangs.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), f"{functions}:moody"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        os.kill(worker, 0)  # it lives
        process.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _is_running(worker):
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- scores of a step -------------------------------------------------------------------------


def outputs(*texts_and_reasons):
    samples = [
        SimpleNamespace(text=t, finish_reason=r, token_ids=list(map(ord, t)))
        for t, r in texts_and_reasons
    ]
    return SimpleNamespace(samples=samples)


def test_score_weighs_functions_and_forwards_columns(functions):
    config = RewardConfig(
        functions=[
            RewardFunction("softgrpo.rewards.math_reward", 2.0),
            RewardFunction(f"{functions}:sometimes", 0.1),
        ]
    )
    prompts = [
        Prompt(Example("1 + 1?", "2", {"answer": "2", "level": 3}), [0]),
        Prompt(Example([{"role": "user", "content": "2 + 2?"}], "4", {"answer": "4"}), [0]),
    ]
    results = [
        outputs((r"\boxed{2}", "stop"), (r"\boxed{2}", "length")),
        outputs((r"\boxed{4}", "stop"), (r"\boxed{5}", "stop")),
    ]
    runner = RewardRunner(config)
    total, by_function = runner.score(prompts, results)
    assert total.tolist() == [5.0, 0.0, 2.0, 0.0]
    assert by_function["math_reward"].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert by_function["sometimes"][:2].tolist() == [30.0, 30.0]
    assert by_function["sometimes"][2:].isnan().all()
    runner.config = dataclasses.replace(config, require_eos=False)
    assert runner.score(prompts, results)[0].tolist() == [5.0, 5.0, 2.0, 0.0]
    runner.close()


def test_a_sample_without_any_reward_has_none():
    runner = RewardRunner(RewardConfig(), [lambda prompts, completions, **columns: [None, 1]])
    prompt = Prompt(Example("q", "2", {"answer": "2"}), [0])
    total, _ = runner.score([prompt], [outputs(("a", "stop"), ("b", "stop"))])
    assert total[0].isnan()
    assert total[1] == 1.0


# --- functions as TRL's documentation writes them -----------------------------------------------


def format_reward(completions, **kwargs):
    return [1.0 if c[0]["content"].startswith("<think>") else 0.0 for c in completions]


async def length_judge(prompts, completions, ground_truth, **kwargs):
    await asyncio.sleep(0)
    return [float(c[0]["content"] == g) for c, g in zip(completions, ground_truth, strict=True)]


def len_reward(completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


def test_trl_s_functions_sync_async_and_weighted_run_unchanged():
    prompt = [{"role": "user", "content": "q"}]
    prompts = [Prompt(Example(prompt, "", {"ground_truth": "ab"}), [0])]
    results = [outputs(("ab", "stop"), ("<think>c", "stop"))]
    functions = [format_reward, length_judge, len_reward]
    runner = RewardRunner(RewardConfig(), functions, [2.0, 10.0, 0.5])
    total, by_function = runner.score(prompts, results)
    assert total.tolist() == [2 * 0 + 10 * 1 - 0.5 * 2, 2 * 1 + 10 * 0 - 0.5 * 8]
    assert by_function["length_judge"].tolist() == [1.0, 0.0]
    assert by_function["len_reward"].tolist() == [-2.0, -8.0]


def test_a_callable_is_not_asked_about_no_samples():
    """A process without a share of few held-out prompts."""

    def best(completions, **columns):
        return [max(map(len, completions))] * len(completions)

    runner = RewardRunner(RewardConfig(), [best])
    assert runner.rewards(call("ab", "c")) == {"best": [2.0, 2.0]}
    assert runner.rewards(call()) == {"best": []}


def test_an_async_function_runs_inside_of_an_event_loop():
    """As in a notebook, where asyncio.run alone raises."""
    runner = RewardRunner(RewardConfig(), length_judge)  # one function needs no list
    prompts = [Prompt(Example([{"role": "user", "content": "q"}], "", {"ground_truth": "a"}), [0])]

    async def notebook():
        return runner.score(prompts, [outputs(("a", "stop"), ("b", "stop"))])[0]

    assert asyncio.run(notebook()).tolist() == [1.0, 0.0]


def test_async_functions_in_a_worker_wait_together_and_can_be_killed(runner):
    one = runner("judge", timeout_s=1.0)
    started = time.monotonic()
    assert one.rewards(call(*["ab"] * 40)) == {"judge": [2.0] * 40}
    assert time.monotonic() - started < 1.0  # 40 times 0.05 s one after the other is 2 s
    assert one.rewards(call("a", "hang", "abc")) == {"judge": [1.0, None, 3.0]}
    assert one.lost == 1


def test_completion_ids_reach_a_worker(runner):
    assert runner("tokens", workers=2).rewards(call("a", "b")) == {"tokens": [97.0, 98.0]}


@pytest.mark.parametrize(
    ("functions", "weights", "expected"),
    [
        ([format_reward, len_reward], [1.0], "2 reward functions have 1 weights"),
        (None, [1.0], "reward.functions"),
    ],
)
def test_weights_that_fit_no_function(functions, weights, expected):
    with pytest.raises(RewardError, match=expected):
        RewardRunner(RewardConfig(), functions, weights)


def test_require_eos_takes_what_a_cut_response_earned_and_keeps_penalties():
    rewards = torch.tensor([1.0, 1.0, -1.0, 1.0])
    ended = apply_require_eos(rewards, ["stop", "length", "length", "abort"])
    assert ended.tolist() == [1.0, 0.0, -1.0, 0.0]


def test_a_worker_whose_runner_was_killed_says_nothing():
    """What was not read when a runner dies resets the connection: no end of file comes."""
    ours, theirs = socket.socketpair()
    program = [sys.executable, "-c", _WORKER_PROGRAM, str(theirs.fileno())]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    worker = subprocess.Popen(program, pass_fds=[theirs.fileno()], **pipes)
    theirs.close()
    connection = Connection(ours.detach())
    connection.send(["softgrpo.rewards.math_reward"])
    assert connection.poll(60)  # its answer is there
    connection.close()
    _, errors = worker.communicate(timeout=60)
    assert (worker.returncode, errors) == (0, b"")
