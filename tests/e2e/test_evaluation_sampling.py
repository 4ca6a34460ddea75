"""Held-out evaluation during training: its own sampling, and no trace of it in the training."""

import dataclasses
import json

import pytest

from softgrpo import Config, Trainer
from softgrpo.run import held_out
from softgrpo.run.held_out import evaluation_rollout
from softgrpo.run.round import Round

CLOCK = ("time/", "step_time", "tokens_per_second")


def test_what_is_null_is_that_of_the_rollout(tiny_config):
    config = Config.load(tiny_config, ["rollout.top_k=-1", "rollout.soft.tau=0.3"])
    assert evaluation_rollout(config) == config.rollout
    own = ["eval.temperature=0.6", "eval.top_p=0.8", "eval.top_k=7", "eval.tau=0.2"]
    rollout = evaluation_rollout(Config.load(tiny_config, [*own, "eval.max_new_tokens=20"]))
    soft = rollout.soft
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (0.6, 0.8, 7)
    assert (soft.temperature, soft.top_p, soft.top_k, soft.tau) == (0.6, 0.8, 7, 0.2)
    assert rollout.max_new_tokens == 20
    changed = dataclasses.replace(
        rollout, temperature=1.0, top_p=0.95, top_k=5, max_new_tokens=10, soft=config.rollout.soft
    )
    assert dataclasses.replace(config.rollout, top_k=5) == changed


def test_training_does_not_see_the_evaluation(tiny_config, tiny_data, tmp_path, monkeypatch):
    drawn = []

    class Spy(Round):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.sampling = arguments[-1]

        def scored(self):
            scored, sampling = super().scored(), self.sampling
            lengths = [len(s.token_ids) for output in scored.outputs for s in output.samples]
            drawn.append((sampling.params.temperature, sampling.soft.temperature, max(lengths)))
            return scored

    monkeypatch.setattr(held_out, "Round", Spy)
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": f"tell {c}", "answer": c}) + "\n" for c in "abcdefgh")
    )
    common = [f"data.eval={tiny_data}", f"data.train={other}", "checkpoint.export_hf=false"]
    common += ["run.max_steps=3"]
    own = ["eval.every=1", "eval.temperature=0.5", "eval.max_new_tokens=17"]
    none = ["eval.before_train=false", "eval.after_train=false"]
    rows = []
    for name, settings in (("with", own), ("without", none)):
        Trainer(Config.load(tiny_config, [*common, *settings, f"run.name={name}"])).train()
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    training = [
        [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in part if "loss" in row]
        for part in rows
    ]
    assert training[0] == training[1]
    assert len(training[0]) == 3
    assert drawn == [(0.5, 0.5, 17)] * 4
    assert max(row["eval/mean_length"] for row in rows[0] if "eval/mean_length" in row) > 10


def test_metrics_go_where_report_to_says(tiny_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ["log.report_to=[tensorboard]", "run.max_steps=2", "checkpoint.export_hf=false"]
    Trainer(Config.load(tiny_config, settings)).train()
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("reward")] == [1, 2]
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([r["reward"] for r in rows])
