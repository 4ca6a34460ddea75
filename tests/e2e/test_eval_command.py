"""softgrpo-eval on a tiny model: the folder it leaves, kills, determinism, errors."""

import json
import re
import sys
import types

import pytest
from evaluations import read
from processes import kill_in_the_middle, start

from softgrpo.cli.eval import main
from softgrpo.evaluation.graders import Grade, Grader
from softgrpo.evaluation.page import write_page
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.requests.prompts import default_uids
from softgrpo_kernels.extension import cpu_extension


def test_a_gpu_gives_what_the_cpu_gives(gpu, command, finished, tmp_path):
    """To the token where there is no mixture: those feed roundings back."""
    assert main(command(tmp_path / "gpu")) == 0
    ours, theirs = (read(folder)["results"] for folder in (tmp_path / "gpu", finished))
    discrete = [row for row in theirs if row["mode"] == "discrete"]
    assert [row for row in ours if row["mode"] == "discrete"] == discrete != []
    soft = [sample for row in ours if row["mode"] == "soft" for sample in row["samples"]]
    expected = [sample for row in theirs if row["mode"] == "soft" for sample in row["samples"]]
    for sample, other in zip(soft, expected, strict=True):
        assert (sample["uid"], sample["text"][:4]) == (other["uid"], other["text"][:4])
        assert sample["effective_candidates"] == pytest.approx(
            other["effective_candidates"], abs=0.5
        )


def assert_same(ours, theirs):
    """Equal but for effective candidates: a GEMM of another size rounds its sums otherwise."""
    left, right = ([e for e in _pop_effective(r) if e] for r in (ours, theirs))
    assert left == pytest.approx(right, abs=2e-4)
    assert len(left) > 40
    assert ours == theirs


def _pop_effective(results):
    rows = [sample for row in results["results"] for sample in row["samples"]]
    return [row.pop("effective_candidates") for row in rows + results["cells"]]


def test_what_an_evaluation_leaves(finished, questions):
    assert sorted(path.name for path in finished.iterdir()) == [
        "report.html",
        "results.json",
        "samples.jsonl",
        "settings.json",
    ]
    results = read(finished)
    cells = [(cell["mode"], cell["temperature"]) for cell in results["cells"]]
    assert cells == [("soft", 0.8), ("soft", 1.0), ("discrete", 0.8), ("discrete", 1.0)]
    assert len(results["results"]) == 4 * 10
    for cell in results["cells"]:
        assert (cell["task"], cell["questions"], cell["samples"]) == (str(questions), 10, 4)
        assert len(cell["pass"]) == 4
    soft, discrete = results["cells"][1], results["cells"][3]
    assert soft["soft"] > 0.9
    assert soft["effective_candidates"] > 1.02
    assert (discrete["soft"], discrete["effective_candidates"]) == (0.0, None)
    assert [row["temperature"] for row in results["soft_minus_discrete"]] == [0.8, 1.0]
    texts = {
        row["mode"]: [s["text"] for s in row["samples"]]
        for row in results["results"]
        if row["question"] == 3 and row["temperature"] == 1.0
    }
    assert len(set(texts["soft"])) > 1
    assert texts["soft"] != texts["discrete"]
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        for shown in line["shown"]:
            assert len(shown["positions"]) == line["samples"][shown["sample"]]["tokens"]


def test_samples_do_not_depend_on_the_batch(finished, command, tmp_path):
    assert main(command(tmp_path / "small", "--batch-size", "7")) == 0
    assert_same(read(tmp_path / "small"), read(finished))


@pytest.mark.skipif(cpu_extension() is None, reason="needs the C++ kernels")
def test_batch_invariant_means_the_same_bits_in_bfloat16(command, tmp_path):
    results = []
    for size in ("2", "40"):
        more = ["--dtype", "bfloat16", "--batch-invariant", "--batch-size", size, "--limit", "4"]
        assert main(command(tmp_path / size, *more)) == 0
        results.append(read(tmp_path / size))
    assert results[0] == results[1]


def test_a_question_does_not_depend_on_the_others(finished, command, tmp_path):
    assert main(command(tmp_path / "one", "--limit", "2", "--mode", "soft")) == 0
    alone = [row for row in read(tmp_path / "one")["results"] if row["question"] == 1]
    among = [row for row in read(finished)["results"] if row["question"] == 1]
    tokens = [[s["text"] for s in row["samples"]] for row in among if row["mode"] == "soft"]
    assert [[s["text"] for s in row["samples"]] for row in alone] == tokens


def test_samples_are_those_of_the_engine(finished, tiny_model):
    """One temperature for both modes, and the noise stream of evaluations."""
    settings = json.loads((finished / "settings.json").read_text())
    llm = LLM(tiny_model, dtype="float32", max_model_len=96)
    prompt = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "say d please"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    uids = [default_uids(prompt, 4)]
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=5, max_tokens=24)
    for mode in ("soft", "discrete"):
        soft = SoftParams(**settings["soft"], temperature=0.8) if mode == "soft" else False
        (output,) = llm.generate_groups([prompt], params, soft, seed=0, uids=uids, stream=1)
        (row,) = [
            row
            for row in read(finished)["results"]
            if (row["mode"], row["temperature"], row["question"]) == (mode, 0.8, 3)
        ]
        assert [s.text for s in output.samples] == [s["text"] for s in row["samples"]]


def test_another_seed_gives_other_samples(finished, command, tmp_path):
    assert main(command(tmp_path / "seed", "--seed", "1", "--limit", "2")) == 0
    ours, theirs = read(tmp_path / "seed")["results"][0], read(finished)["results"][0]
    assert [s["text"] for s in ours["samples"]] != [s["text"] for s in theirs["samples"]]


def test_killed_and_resumed_is_the_same(finished, command, tmp_path):
    folder = tmp_path / "killed"
    arguments = command(folder, "--batch-size", "4")
    samples = folder / "samples.jsonl"
    kill_in_the_middle(start("softgrpo.cli.eval", *arguments), samples, "\n", 5)
    left = samples.read_bytes()
    assert 5 <= left.count(b"\n") < 40
    assert not (folder / "results.json").exists()
    kept = left[: left.rfind(b"\n") + 1]
    samples.write_bytes(kept + b'{"task": "half a li')  # as a kill inside a write leaves it
    assert main(arguments) == 0
    assert samples.read_bytes().startswith(kept)  # nothing finished is done again
    assert samples.read_bytes().count(b"\n") == 40
    assert_same(read(folder), read(finished))


def test_scores_follow_the_grades_and_a_second_call_only_scores(
    command, tmp_path, monkeypatch, capsys
):
    """Grades by a rule that the texts of a random model meet now and then."""

    def grade(self, example, texts):
        return [Grade(float("a" in text), text[:1] or None) for text in texts]

    monkeypatch.setattr(Grader, "grade", grade)
    folder = tmp_path / "graded"
    assert main(command(folder, "--mode", "soft", "--temperature", "1.0", "--k", "1,4")) == 0
    unbiased = read(folder)
    right = [[s["correct"] for s in row["samples"]] for row in unbiased["results"]]
    assert right == [["a" in s["text"] for s in row["samples"]] for row in unbiased["results"]]
    share = sum(map(sum, right)) / 40
    assert 0 < share < 1
    (cell,) = unbiased["cells"]
    assert cell["mean"]["value"] == pytest.approx(share)
    table = capsys.readouterr().out
    assert f"{share:.3f}" in table
    assert f"{cell['pass'][3]['value']:.3f}" in table

    monkeypatch.setattr("softgrpo_engine.LLM.__init__", None)  # the model is not needed again
    arguments = command(folder, "--mode", "soft", "--temperature", "1.0")
    assert main([*arguments, "--estimator", "prefix"]) == 0
    (cell,) = read(folder)["cells"]
    for k in (1, 2, 3, 4):
        prefix = sum(any(question[:k]) for question in right) / 10
        assert cell["pass"][k - 1]["value"] == pytest.approx(prefix)
    assert "pass@k of the first k" in capsys.readouterr().out


def test_a_recipe_fills_in_the_task_and_how_it_is_asked(tiny_config, tiny_data, tmp_path):
    recipe = tiny_config.read_text().replace(
        "eval: null", f"eval: {tiny_data}, prompt_template: 'X'"
    )
    tiny_config.write_text(
        recipe.replace("max_prompt_tokens", "system_prompt: be, eval_size: 2, max_prompt_tokens")
    )
    model = re.search(r"model: \{path: (.*?),", recipe)[1]
    arguments = ["--model", model, "--recipe", str(tiny_config), "--samples", "1", "--mode", "soft"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    results = read(tmp_path / "out")
    settings = results["settings"]
    assert (settings["tasks"], settings["max_tokens"]) == ([str(tiny_data)], 10)
    assert (settings["system_prompt"], settings["prompt_template"]) == ("be", "X")
    assert [row["prompt"] for row in results["results"]] == ["X", "X"]


def test_compare_prints_the_paired_differences(finished, capsys):
    assert main(["--compare", str(finished), str(finished / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("10 questions") == 4
    assert "soft T 0.8: mean +0.000 (+0.000 +0.000), pass@4" in printed


def test_the_page_needs_nothing_from_outside_and_keeps_text_text(tiny_model, tmp_path, monkeypatch):
    hostile = "</script><script>alert(1)</script><!-- {{data}}"
    monkeypatch.setattr(
        Grader, "grade", lambda self, example, texts: [Grade(1.0, hostile) for _ in texts]
    )
    task = tmp_path / "hostile.jsonl"
    task.write_text(json.dumps({"prompt": hostile, "answer": "x"}) + "\n")
    arguments = ["--model", str(tiny_model), "--task", str(task), "--samples", "2"]
    arguments += ["--max-tokens", "4", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(|\bsrc=", page)
    assert page.count("<script") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["tasks"][0]["questions"][0]["prompt"] == hostile
    assert data["cells"][0]["samples"][0][0][1] == hostile
    assert len(data["cells"][0]["shown"]["0"]["0"]) == data["cells"][0]["samples"][0][0][2]


def test_a_large_page_keeps_the_candidates_of_evenly_spread_questions(
    finished, tmp_path, monkeypatch
):
    rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    results = json.loads((finished / "results.json").read_text())
    folder = types.SimpleNamespace(report=tmp_path / "report.html", rows=lambda: rows)
    total = sum(len(shown["positions"]) for row in rows for shown in row["shown"])
    monkeypatch.setattr("softgrpo.evaluation.page._POSITIONS", total // 3 + 1)
    monkeypatch.setattr("softgrpo.evaluation.page._MOST_SENTENCES", 1)
    write_page(folder, results)
    page = folder.report.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [sorted(map(int, cell["shown"])) for cell in data["cells"]] == [[0, 3, 6, 9]] * 4
    assert all(len(cell["samples"]) == 10 for cell in data["cells"])
    assert "Of 2 comparisons at the same temperature" in page


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--max-tokens", "25"], "max_tokens = 24, this command has 25"),
        (["--tau", "0.5"], r"soft\.tau = 0\.7, this command has 0\.5"),
        (["--mode", "soft"], "modes = "),
        (["--seed", "9"], "seed = 0, this command has 9"),
    ],
)
def test_a_changed_setting_is_refused_by_name(finished, command, capsys, more, names):
    assert main(command(finished, *more)) == 2
    assert re.search(names + r".*another --output", one_line(capsys))


def test_changed_questions_are_refused(finished, command, questions, capsys):
    before = questions.read_text()
    try:
        questions.write_text(before.replace("say c", "say C"))
        assert main(command(finished)) == 2
    finally:
        questions.write_text(before)
    assert "questions." in one_line(capsys)


def one_line(capsys):
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("softgrpo-eval: error: ")
    return error[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "gsm8"], "did you mean 'gsm8k'"),
        ([], "give --task: aime24"),
        (["--task", "humaneval"], "--allow-code-execution"),
        (["--task", "gsm8k", "--k", "1,33"], r"--k 33 .*--samples \(32\)"),
        (["--task", "gsm8k", "--k", "x"], "--k 'x' is not a list of numbers"),
        (["--task", "gsm8k", "--samples", "0"], "--samples 0"),
        (["--task", "gsm8k", "--limit", "0"], "--limit 0"),
        (["--task", "gsm8k"], "--task gsm8k=FILE, columns question, answer"),
        (["--task", "none.jsonl"], "no such file: none.jsonl"),
        (["--task", "QUESTIONS", "--recipe", "dmo"], "dmo"),
        (["--task", "QUESTIONS", "--model", "/no/such"], "/no/such"),
        (["--task", "QUESTIONS", "--mode", "sof"], "--mode 'sof'"),
        (["--task", "QUESTIONS", "--thoughts", "none"], "must be own, argmax, or filler:N"),
        (["--task", "QUESTIONS", "--thoughts", "filler:0"], "must be own, argmax, or filler:N"),
        (["--task", "QUESTIONS", "--thoughts", "filler:2", "--mode", "soft"], "--mode discrete"),
        (["--task", "QUESTIONS", "--thoughts", "argmax", "--mode", "discrete"], "--mode soft"),
        (["--task", "QUESTIONS", "--thoughts", "filler:2:abc"], "the filler token='abc' is 3"),
        (
            ["--task", "QUESTIONS", "--max-tokens", "9", "--min-soft-tokens", "10"],
            "more than max_to",
        ),
        (["--task", "QUESTIONS", "--temperature", "0"], "temperature 0 has no soft mode"),
        (["--task", "QUESTIONS", "--temperature", "-1"], "temperature=-1.0"),
        (["--task", "QUESTIONS", "--tau", "0"], "tau=0.0"),
        (["--task", "QUESTIONS", "--max-tokens", "999"], "max_model_len"),
        (["--compare", "none.json", "none.json"], "no such file: none.json"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments, says, tiny_model, questions, monkeypatch, capsys, tmp_path
):
    def offline(*names, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    monkeypatch.chdir(tmp_path)
    arguments = [str(questions) if a == "QUESTIONS" else a for a in arguments]
    model = [] if "--model" in arguments else ["--model", str(tiny_model)]
    assert main([*arguments, *model]) == 2
    assert re.search(says, one_line(capsys))


def test_a_missing_column_lists_those_there_are(tmp_path, capsys):
    file = tmp_path / "g.jsonl"
    file.write_text('{"query": "?", "answer": "#### 1"}\n')
    assert main(["--task", f"gsm8k={file}"]) == 2
    assert "no column 'question'; gsm8k needs question, answer; columns: query, answer" in one_line(
        capsys
    )


def test_two_writers_in_one_folder_are_refused(finished, command, capsys):
    import fcntl

    with (finished / "samples.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(finished)) == 2
    assert "another softgrpo-eval is writing" in one_line(capsys)
