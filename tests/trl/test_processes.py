"""Several processes draw and learn what one does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl.trainer", reason="TRL is not installed: make test-trl")

SCRIPT = Path(__file__).parent / "two_steps.py"


def test_two_processes_make_the_steps_of_one(hf_model, tokenizer, tmp_path):
    model = tmp_path / "model"
    hf_model.save_pretrained(model)
    tokenizer.save_pretrained(model)
    spec = importlib.util.spec_from_file_location("two_steps", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(str(model), str(tmp_path / "one.json"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, str(SCRIPT), str(model), str(tmp_path / "two.json")]
    subprocess.run(command, check=True, timeout=240)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for alone, together in zip(one, two, strict=True):
        for name in (
            "reward",
            "reward_std",
            "grad_norm",
            "kl",
            "entropy",
            "completions/mean_length",
        ):
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert one[1]["kl"] > 0.01
