"""From graded samples to numbers: cells, comparisons, files of generations."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from softgrpo.data.sources import DataError
from softgrpo.evaluation import bootstrap_interval, pass_at_k, score_file
from softgrpo.evaluation.results import compare_results, read_results
from softgrpo.evaluation.scores import cell_summary, compare_cells, group_cells, question_score


def sample(answer, correct, tokens=10, soft=0, effective=None, finish="stop", score=1.0):
    return {
        "text": "",
        "answer": answer,
        "score": float(correct) if score is not None else None,
        "correct": correct,
        "tokens": tokens,
        "soft": soft,
        "effective_candidates": effective,
        "finish_reason": finish,
        "uid": 0,
    }


def row(question, samples, mode="soft", temperature=1.0, task="t", prompt=None):
    return {
        "task": task,
        "mode": mode,
        "temperature": temperature,
        "question": question,
        "prompt": prompt or f"q{question}",
        "gold": "7",
        "seconds": 0.5,
        "samples": samples,
    }


def test_question_score():
    score = question_score([False, True, False, True], ["3", "7", "3", "7"], "unbiased", votes=True)
    assert score.mean == 0.5
    assert score.passes == [pass_at_k(4, 2, k) for k in (1, 2, 3, 4)]
    assert score.maj == 0.0  # a tie, the wrong one came first
    prefix = question_score([False, True, False, True], [None] * 4, "prefix", votes=False)
    assert prefix.passes == [0, 1, 1, 1]
    assert prefix.maj is None


def test_the_majority_is_right_when_its_samples_are():
    """The winner need not be spelt as the gold answer is."""
    score = question_score([True, True, False], ["0.5", "0.5", "2"], "unbiased", votes=True)
    assert score.maj == 1.0


def test_cell_summary():
    rows = [
        row(0, [sample("7", True, 10, 8, 1.5), sample(None, False, 30, 0, None, "length")]),
        row(1, [sample("3", False, 20, 2, 3.0), sample("3", False, 20, score=None)]),
    ]
    summary = cell_summary(rows, "unbiased", votes=True)
    assert summary["mean"]["value"] == 0.25
    assert [entry["value"] for entry in summary["pass"]] == [0.25, 0.5]
    assert summary["maj"]["value"] == 0.5
    low, high = bootstrap_interval([0.5, 0.0])
    assert (summary["mean"]["low"], summary["mean"]["high"]) == pytest.approx((low, high))
    assert summary["length"] == {"mean": 20.0, "median": 20.0, "longest": 30}
    assert (summary["truncated"], summary["answered"], summary["lost"]) == (0.25, 0.75, 1)
    assert summary["soft"] == 10 / 80
    assert summary["effective_candidates"] == pytest.approx((8 * 1.5 + 2 * 3.0) / 10)


def test_differences_are_paired_by_question():
    ours = [row(q, [sample("7", True), sample("7", q % 2 == 0)]) for q in range(40)]
    theirs = [row(q, [sample("7", q % 2 == 0), sample("3", False)]) for q in range(40)]
    change = compare_cells(ours, theirs, "unbiased", votes=True)
    # every question differs by exactly one half: no interval is left of the paired difference
    assert change["mean"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    with pytest.raises(ValueError, match="different questions"):
        compare_cells(ours, theirs[::-1], "unbiased", votes=True)
    with pytest.raises(ValueError, match="different questions"):
        compare_cells(ours, [row(q, [], prompt="other") for q in range(40)], "unbiased", votes=True)


def results(*rows):
    return {"results": list(rows), "graders": {"t": "math"}, "settings": {}}


def test_comparison_matches_cells():
    right, wrong = [sample("7", True)] * 2, [sample("3", False)] * 3
    ours = results(row(0, right), row(0, right, "discrete"), row(0, right, "soft", 0.6))
    theirs = results(row(0, wrong, "soft", 0.6), row(0, wrong))
    found = compare_results(ours, theirs, "unbiased")
    assert [(r["ours"], r["theirs"]) for r in found] == [(("soft", t),) * 2 for t in (1.0, 0.6)]
    assert found[0]["mean"]["value"] == 1.0
    assert len(found[0]["pass"]) == 2  # the samples that both have
    (only,) = compare_results(results(row(0, right)), results(row(0, wrong, "discrete")), "prefix")
    assert (only["ours"], only["theirs"]) == (("soft", 1.0), ("discrete", 1.0))
    with pytest.raises(ValueError, match="nothing to compare: the first has t soft T 1"):
        compare_results(results(row(0, right)), results(row(0, right, task="u")), "unbiased")


def test_cells_are_in_the_order_of_their_questions():
    cells = group_cells([row(2, []), row(0, []), row(1, [])])
    assert [r["question"] for r in cells["t", "soft", 1.0]] == [0, 1, 2]


def test_results_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_results(tmp_path / "none.json")
    for text in ("[]", "{}", "not json", "3"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not a results.json of softgrpo-eval"):
            read_results(tmp_path)


GENERATIONS = [
    {"answer": "1/2", "completions": ["\\boxed{0.5}", "\\boxed{\\frac12}", "none"]},
    {"answer": "3", "completions": ["\\boxed{4}", "\\boxed{4}", "\\boxed{3}"]},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_score_file(tmp_path):
    found = score_file(write_jsonl(tmp_path / "g.jsonl", GENERATIONS))
    assert (found["questions"], found["samples"], found["lost"]) == (2, 3, 0)
    assert found["mean"]["value"] == 0.5
    expected = [(pass_at_k(3, 2, k) + pass_at_k(3, 1, k)) / 2 for k in (1, 2, 3)]
    assert [entry["value"] for entry in found["pass"]] == pytest.approx(expected)
    assert found["maj"]["value"] == 0.5
    flat = [
        {"prompt": f"q{i}", "answer": g["answer"], "completion": text}
        for i, g in enumerate(GENERATIONS)
        for text in g["completions"]
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat[::-1]), tmp_path / "g.parquet")
    turned = score_file(tmp_path / "g.parquet", "prefix")
    assert turned["mean"] == found["mean"]
    assert [entry["value"] for entry in turned["pass"]] == [0.5, 1.0, 1.0]


def test_score_file_needs_equal_samples_and_its_columns(tmp_path):
    uneven = [GENERATIONS[0], {"answer": "3", "completions": ["\\boxed{3}"]}]
    with pytest.raises(DataError, match=r"1 to 3 samples: give each the same number"):
        score_file(write_jsonl(tmp_path / "u.jsonl", uneven))
    with pytest.raises(DataError, match=r"row 0: no column 'answer'.* columns: completions"):
        score_file(write_jsonl(tmp_path / "c.jsonl", [{"completions": ["x"]}]))
    with pytest.raises(DataError, match=r"no column 'prompt'"):
        score_file(write_jsonl(tmp_path / "p.jsonl", [{"answer": "1", "completion": "x"}]))
    with pytest.raises(DataError, match=r"must be texts, at least one"):
        score_file(write_jsonl(tmp_path / "e.jsonl", [{"answer": "1", "completions": []}]))
