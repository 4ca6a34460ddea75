"""softgrpo-eval with other thoughts than the model's own, and rules that end them."""

from evaluations import read

from softgrpo.cli.eval import main
from softgrpo_engine import LLM, SamplingParams
from softgrpo_engine.requests.prompts import default_uids, thinking_end_id


def test_argmax_feeds_the_heaviest_candidate_alone(finished, command, tmp_path):
    """Of the same draws: samples differ from the model's own only by what the mixtures add."""
    folder = tmp_path / "argmax"
    assert main(command(folder, "--thoughts", "argmax")) == 0
    ours, own = read(folder), read(finished)
    assert (ours["settings"]["thoughts"], own["settings"]["thoughts"]) == ("argmax", "own")
    assert "the heaviest candidate of each mixture" in (folder / "report.html").read_text()
    assert [cell["mode"] for cell in ours["cells"]] == ["soft", "soft", "discrete", "discrete"]
    assert all(cell["effective_candidates"] in (1.0, None) for cell in ours["cells"])
    assert ours["cells"][0]["soft"] > 0.9
    texts = [
        {
            mode: [s["text"] for row in r["results"] if row["mode"] == mode for s in row["samples"]]
            for mode in ("soft", "discrete")
        }
        for r in (ours, own)
    ]
    assert texts[0]["discrete"] == texts[1]["discrete"]
    assert texts[0]["soft"] != texts[1]["soft"]
    # The first token has seen no mixture.
    assert [t[:1] for t in texts[0]["soft"]] == [t[:1] for t in texts[1]["soft"]]


def test_rules_of_entropies_are_settings(command, tmp_path):
    """Of the tiny model: cold at once, so that thinking has two positions."""
    flags = ["--cold-stop-entropy", "99", "--cold-stop-steps", "2"]
    flags += ["--mode", "soft", "--limit", "2"]
    assert main(command(tmp_path / "cold", *flags)) == 0
    results = read(tmp_path / "cold")
    assert results["settings"]["soft"]["cold_stop_entropy"] == 99
    assert {s["soft"] for row in results["results"] for s in row["samples"]} <= {0, 1, 2}
    assert any(s["soft"] == 2 for row in results["results"] for s in row["samples"])


def test_filler_thoughts_end_the_prompt(command, tiny_model, tmp_path):
    folder = tmp_path / "filler"
    assert main(command(folder, "--thoughts", "filler:3:b", "--limit", "2")) == 0
    results = read(folder)
    assert results["settings"]["thoughts"] == "filler"
    assert results["settings"]["filler_thoughts"] == {"count": 3, "token": "b"}
    assert {cell["mode"] for cell in results["cells"]} == {"discrete"}
    assert "3 filler tokens" in (folder / "report.html").read_text()
    llm = LLM(tiny_model, dtype="float32", max_model_len=96)
    prompt = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "say b please"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    ids = prompt + llm.tokenizer.encode("b", add_special_tokens=False) * 3
    end = thinking_end_id("auto", llm.tokenizer)
    ids += [] if end is None else [end]
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=5, max_tokens=24)
    uids = [default_uids(ids, 4)]
    (output,) = llm.generate_groups([ids], params, seed=0, uids=uids, stream=1)
    row = next(r for r in results["results"] if r["question"] == 1 and r["temperature"] == 0.8)
    assert [s["text"] for s in row["samples"]] == [s.text for s in output.samples]
