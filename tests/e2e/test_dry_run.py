"""softgrpo-train --dry-run: tries everything, leaves nothing."""

import pytest
import torch

from softgrpo import Config, Trainer
from softgrpo.cli.train import main
from softgrpo.tools.dry_run import _training_bytes


def test_it_says_what_would_be_run_and_leaves_nothing(tiny_config, tiny_reward, tmp_path, capsys):
    dtype = Config.load(tiny_config).model.dtype
    assert main(["--dry-run", "--config", str(tiny_config), "algorithm.kl_coef=0.01"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 24
    for text in (
        f"9,824 parameters, {dtype}",
        "16 examples",
        f"{tiny_reward}:early_letters",
        "3 prompts x 4 samples: 30 prompt tokens, at most 120 new ones",
        "for 6 steps",
        "GiB at the peak",
    ):
        assert text in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", [0, 3])
def test_frozen_weights_have_neither_gradients_nor_moments(rank, tiny_config):
    if rank:
        pytest.importorskip("peft")
    trainer = Trainer(Config.load(tiny_config, [f"lora.rank={rank}"]))
    assert torch.are_deterministic_algorithms_enabled()  # as run.deterministic asks
    trainer.step(1)
    trainer.rewards.close()
    parameters = list(trainer.policy.decoder.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    steps = 4 * sum(p.requires_grad for p in parameters)  # Adam counts them for each parameter
    assert bool(frozen) == bool(rank)
    itemsize = getattr(torch, trainer.config.model.dtype).itemsize
    assert _training_bytes(trainer) == 16 * trained + itemsize * frozen + steps


@pytest.mark.parametrize(
    ("body", "settings", "expected"),
    [
        # Found by the tiny step alone: the reward, and an option that would leave it unlearnt.
        ("raise KeyError('colour')", [], "'bad' raised KeyError: 'colour'"),
        ("return [0.0]", [], "returned 1 rewards for 2 completions"),
        ("return [0.0] * len(completions)", ["algorithm.mask_truncated=true"], None),
        ("return [0.0] * len(completions)", ["run.resume=nowhere"], "no checkpoint"),
    ],
)
def test_it_finds_what_training_would_trip_over(
    body, settings, expected, tiny_config, tmp_path, capsys
):
    path = tmp_path / "bad.py"
    path.write_text(f"def bad(completions, **columns):\n    {body}\n")
    functions = f'reward.functions=[{{path: "{path}:bad"}}]'
    command = ["--dry-run", "--config", str(tiny_config), functions, *settings]
    if expected is None:
        assert main(command) == 0
    else:
        with pytest.raises(SystemExit):
            main(command)
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_it_tries_the_gradient(tiny_config, tmp_path, capsys, monkeypatch):
    from softgrpo.learner.update import Update

    seen = []
    update = Update.__call__

    def spy(self, batch, *args):
        result = update(self, batch, *args)
        seen.append((len(batch.group), int(batch.response_lens.max()), result[1]))
        return result

    monkeypatch.setattr(Update, "__call__", spy)
    assert main(["--dry-run", "--config", str(tiny_config)]) == 0
    assert seen == [(4, 4, 1), (12, 4, 2)]  # samples, tokens, updates
