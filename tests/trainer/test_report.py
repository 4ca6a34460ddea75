"""The run report: sound from any run folder, and nothing but itself."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from softgrpo.cli.report import main
from softgrpo.report import build_report

CONFIG = """\
run: {{name: {name}, seed: 0, max_steps: {steps}}}
model: {{path: smollm2-135m, dtype: bfloat16}}
data: {{train: "reasoning_gym:chain_sum?min_terms=2&max_terms=2"}}
rollout:
  prompts_per_step: 8
  group_size: 8
  soft: {{enabled: {soft}, top_k: 5, tau: 0.1}}
algorithm: {{objective: exact}}
optim: {{lr: 1.0e-05}}
"""


def metrics_row(step, steps, rng, soft=True):
    """A plausible row of metrics.jsonl for a run that learns."""
    reward = 0.15 + 0.4 * (1 - math.exp(-3 * step / steps)) + rng.gauss(0, 0.05)
    times = {"rollout": 2.4, "reward": 0.1, "train": 2.5, "sync": 0.12}
    times = {f"time/{name}": t * rng.uniform(0.9, 1.15) for name, t in times.items()}
    row = {
        "step": step,
        "reward": reward,
        "reward_std": 0.3 * rng.uniform(0.8, 1.2),
        "frac_reward_zero_std": rng.choice([0.125, 0.25, 0.375]),
        "completions/mean_length": 16 + rng.gauss(0, 1) + 4 * step / steps,
        "completions/min_length": 9,
        "completions/max_length": 32,
        "completions/clipped_ratio": max(0.0, 0.3 - 0.3 * step / steps + rng.gauss(0, 0.03)),
        "loss": rng.gauss(0, 2e-3),
        "grad_norm": 0.6 * rng.uniform(0.6, 1.6),
        "learning_rate": 1e-5,
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.0,
        "sampling/sampling_logp_difference/mean": 0.03 * rng.uniform(0.9, 1.1),
        "sampling/sampling_logp_difference/max": 0.4 * rng.uniform(0.7, 1.4),
        "num_tokens": 1200 * step,
        "tokens_per_second": 780 * rng.uniform(0.9, 1.1),
        "step_time": sum(times.values()),
        **times,
    }
    if soft:
        row |= {
            "soft/effective_candidates": 1.12 + rng.gauss(0, 0.01),
            "soft/top_weight": 0.955 + rng.gauss(0, 0.005),
            "soft/kept_slots": 2.1 - 0.5 * step / steps + rng.gauss(0, 0.05),
            "soft/length": 15 + rng.gauss(0, 1),
        }
    return row


def sample_row(step, phase, rng, uid):
    """One sum with a plausible completion; some positions are mixtures."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    right = rng.random() < 0.5
    result = str(a + b if right else a + b + rng.choice([-10, 1, 10]))
    tokens = ["The", " sum", " of", " ", *str(a), " and", " ", *str(b), " is", ":", "\n\n"]
    tokens += ["\\", "boxed", "{", *result, "}"]
    others = [" answer", "8", "3", "9", " the", " result", " total", ".", "="]
    positions = []
    for token in tokens:
        top = rng.choice([1.0, 1.0, 1.0, 0.97, 0.83, 0.6])
        rest = sorted((rng.random() for _ in range(rng.randint(1, 4))), reverse=True)
        pairs = [[token, top]]
        if top < 1:
            names = rng.sample(others, len(rest))
            shares = [round((1 - top) * x / sum(rest), 4) for x in rest]
            pairs += [list(pair) for pair in zip(names, shares, strict=True)]
        kind = int(len(positions) < len(tokens) - 2)
        pairs = pairs if kind else [[token, 1.0]]
        positions.append({"token": token, "kind": kind, "forced": False, "candidates": pairs})
    ending = {"token": "<|im_end|>", "kind": 0, "candidates": [["<|im_end|>", 1.0]]}
    positions.append({**ending, "forced": step % 20 == 0})
    return {
        "step": step,
        "phase": phase,
        "prompt": f"What is {a} + {b}?",
        "answer": str(a + b),
        "text": "".join(tokens),
        "reward": float(right),
        "advantage": rng.gauss(0, 1) if phase == "train" else None,
        "finish_reason": "stop",
        "uid": uid,
        "positions": positions,
    }


def write_run(folder, steps=40, soft=True, seed=0):
    """A run folder as training leaves it: evaluations at the start, the middle and the end."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG.format(name=folder.name, steps=steps, soft=str(soft).lower())
    (folder / "config.yaml").write_text(config)
    rows, samples = [], []
    for step in range(steps + 1):
        if step:
            rows.append(metrics_row(step, steps, rng, soft))
        if step in (0, steps // 2, steps):
            done = step / steps
            scores = {"eval/mean@8": 0.15 + 0.36 * done, "eval/pass@1": 0.15 + 0.36 * done}
            rows.append({"step": step, **scores, "eval/pass@8": 0.47 + 0.22 * done})
            samples += [sample_row(step, "eval", rng, 10**6 + step + i) for i in range(2)]
        elif step % 5 == 0:
            samples += [sample_row(step, "train", rng, step * 64 + i) for i in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


class Page(HTMLParser):
    """A parsed page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.scripts, self.visible = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(text)
        elif inside != "style":
            self.visible.append(text)

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def words(self):
        return " ".join(self.visible)


def test_report_tells_what_happened(tmp_path):
    page = Page(build_report(write_run(tmp_path / "demo")))
    assert "Held-out mean@8 rose from 0.150 at step 0 to 0.510 at step 40." in page.words
    assert "Held-out pass@8 rose from 0.470 at step 0 to 0.690 at step 40." in page.words
    assert "smollm2-135m" in page.words
    assert "soft thinking" in page.words
    run = page.data["runs"][0]
    assert run["step"] == list(range(1, 41))
    assert [row["step"] for row in run["evals"]] == [0, 20, 40]
    assert "soft/top_weight" in run["columns"]


def test_report_needs_nothing_from_outside(tmp_path):
    path = build_report(write_run(tmp_path / "demo"))
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    page = Page(path)
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "action"} & a.keys()]
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []


def test_samples_survive_the_packing(tmp_path):
    folder = write_run(tmp_path / "demo")
    original = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    packed = Page(build_report(folder)).data["samples"]
    assert len(packed["rows"]) == len(original)
    for sample, row in zip(original, packed["rows"], strict=True):
        assert (row["prompt"], row["reward"]) == (sample["prompt"], sample["reward"])
        for position, (flags, token, *pairs) in zip(
            sample["positions"], row["positions"], strict=True
        ):
            assert flags == position["kind"] + 2 * position["forced"]
            assert packed["vocabulary"][token] == position["token"]
            names = [packed["vocabulary"][i] for i in pairs[::2]]
            assert names == [name for name, _ in position["candidates"]]
            weights = [weight for _, weight in position["candidates"]]
            assert [w / 10_000 for w in pairs[1::2]] == pytest.approx(weights, abs=5e-5)


HOSTILE = "</script><script>alert(1)</script><!-- {{data}} \"&' \u2028 \x00 \x1b[2J"


def test_hostile_strings_stay_text(tmp_path):
    folder = write_run(tmp_path / "demo")
    sample = sample_row(5, "train", random.Random(0), HOSTILE)
    sample |= {"prompt": HOSTILE, "answer": HOSTILE, "finish_reason": HOSTILE, "phase": HOSTILE}
    sample["positions"][0] |= {"token": HOSTILE, "candidates": [[HOSTILE, 0.7], ["\ud800", 0.3]]}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample) + "\n")
    config = f"run: {{name: {json.dumps(HOSTILE)}}}\nmodel: {{path: {json.dumps(HOSTILE)}}}\n"
    (folder / "config.yaml").write_text(config)
    page = Page(build_report(folder, compare=folder))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.data["samples"]["rows"][-1]["prompt"] == HOSTILE
    assert page.data["runs"][1]["name"] == HOSTILE
    assert "\ud800" in page.data["samples"]["vocabulary"]


def test_a_run_that_has_only_begun(tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    page = Page(build_report(folder))
    assert "No step has been recorded yet." in page.words
    assert page.data["runs"][0]["step"] == []
    assert page.data["samples"]["rows"] == []


def test_discrete_run_has_no_soft_curves(tmp_path):
    page = Page(build_report(write_run(tmp_path / "plain", soft=False)))
    assert not [name for name in page.data["runs"][0]["columns"] if name.startswith("soft/")]
    assert "discrete" in page.words


def test_missing_values_and_a_killed_writer(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    rows = [
        '{"step": 1, "reward": NaN, "loss": Infinity, "step_time": 1.0}',
        '{"step": 2, "reward": null, "step_time": 2.0}',
        "not json",
        '{"step": 3, "reward": 0.5}',
        '{"step": 3, "eval/mean@8": NaN}',
        '{"step": 4, "rew',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    cut = '{"step": 1, "phase": "train", "prompt": "é'.encode()[:-1]
    (folder / "samples.jsonl").write_bytes(b'{"step": 1, "positions": null, "text": "x"}\n' + cut)
    page = Page(build_report(folder))
    run = page.data["runs"][0]
    assert run["step"] == [1, 2, 3]
    assert run["columns"]["reward"] == [None, None, 0.5]
    assert "loss" not in run["columns"]
    assert page.data["samples"]["rows"][0]["text"] == "x"
    assert "1 unreadable line of its files was left out." in page.words
    assert "no config.yaml" in page.words


def test_second_run_is_laid_over_the_first(tmp_path):
    first = write_run(tmp_path / "soft", seed=1)
    second = write_run(tmp_path / "discrete", steps=30, soft=False, seed=2)
    page = Page(build_report(first, compare=second))
    assert [run["name"] for run in page.data["runs"]] == ["soft", "discrete"]
    assert "Dashed lines show the run discrete." in page.words
    cells = page.words[page.words.index("setting soft discrete") :].split()
    changed = ["run.max_steps", "40", "30", "rollout.soft.enabled", "true", "false"]
    assert cells[3:10] == [*changed, "Curves"]
    assert not (second / "report.html").exists()


def test_runs_of_the_same_settings_have_no_differences(tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    assert "Their settings are the same." in Page(build_report(*runs)).words


def test_thousand_steps_stay_small(tmp_path):
    folder = write_run(tmp_path / "long", steps=1000)
    page = build_report(folder)
    assert page.stat().st_size < 2**20


def test_large_sample_files_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr("softgrpo.report.read._SAMPLES_BYTES", 20_000)
    folder = write_run(tmp_path / "large")
    total = len((folder / "samples.jsonl").read_text().splitlines())
    data = Page(build_report(folder)).data
    assert data["samplesEvery"] > 1
    assert len(data["samples"]["rows"]) == math.ceil(total / data["samplesEvery"])


def test_command_prints_the_path(tmp_path, capsys):
    folder = write_run(tmp_path / "demo", steps=10)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_command_reports_errors_in_one_line(tmp_path, capsys, make):
    make(tmp_path / "none")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "none")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "none") in error
