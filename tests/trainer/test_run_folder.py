"""The run folder survives a kill at any moment."""

import json

import pytest
import torch

from softgrpo.log.files import read_jsonl
from softgrpo.run.checkpoint import load_checkpoint
from softgrpo.run.folder import RunFolder


def make_model(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer


def advance(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


def test_checkpoint_restores_weights_and_optimizer_bitwise(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create("run: {}")
    model, optimizer = make_model(0)
    advance(model, optimizer)
    path = folder.save_checkpoint(1, model, optimizer, {"num_tokens": 7}, keep=2)
    again, its_optimizer = make_model(1)
    state = load_checkpoint(path, again, its_optimizer)
    assert state == {"step": 1, "num_tokens": 7}
    for _ in range(3):
        advance(model, optimizer)
        advance(again, its_optimizer)
    assert torch.equal(model.weight, again.weight)
    assert torch.equal(model.bias, again.bias)


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path):
    folder = RunFolder(tmp_path)
    model, optimizer = make_model(0)
    for step in (5, 10, 15):
        folder.save_checkpoint(step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step_000010", "step_000015"]
    # What a kill in the middle of the next one leaves:
    (folder.checkpoints / "step_000020.tmp").mkdir()
    assert folder.latest_checkpoint() == folder.checkpoints / "step_000015"
    folder.save_checkpoint(20, model, optimizer, {}, keep=2)
    assert folder.latest_checkpoint() == folder.checkpoints / "step_000020"


def test_the_best_checkpoint_stays(tmp_path):
    folder = RunFolder(tmp_path)
    model, optimizer = make_model(0)
    for step in (1, 2, 3, 4):
        folder.save_checkpoint(step, model, optimizer, {}, keep=1, best=min(step, 2))
    assert folder.checkpoint_steps() == [2, 4]


def test_rows_after_the_checkpoint_are_dropped_and_a_cut_line_is_no_error(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(1, 5):
        folder.append_metrics({"step": step, "reward": float("nan")})
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "rew')
    folder.truncate_after(3)
    assert [row["step"] for row in read_jsonl(folder.metrics)] == [1, 2, 3]
    assert all(json.loads(line)["reward"] is None for line in folder.metrics.open())


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    model, optimizer = make_model(0)
    path = folder.save_checkpoint(1, model, optimizer, {}, keep=1)
    other = torch.nn.Linear(4, 2)
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path, model, optimizer)
