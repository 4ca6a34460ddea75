"""softgrpo-env: what it says is what is there."""

import json
import os
import platform
import subprocess
import sys

import torch

from softgrpo.cli.env import main
from softgrpo_engine.ops.packed_linear import matrix_unit


def test_json_names_versions_back_ends_and_what_is_missing(capsys):
    assert main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "cpu", "gpu", "memory_gib", "back_ends", "missing"}
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert 0 < facts["memory_gib"]["available"] <= facts["memory_gib"]["total"]
    assert bool(facts["gpu"]) == torch.cuda.is_available() == ("cuda" in facts["back_ends"])
    assert ("GPU" in [entry["what"] for entry in facts["missing"]]) != bool(facts["gpu"])
    amx = "AMX" in facts["back_ends"]["cpu"]["linear layers, bfloat16"]
    assert amx == (matrix_unit() == "amx")


def test_text_has_the_same_facts(capsys):
    main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    main([])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    assert ["torch", torch.__version__] in lines
    text = "\n".join(" ".join(line) for line in lines)
    for families in facts["back_ends"].values():
        for family, back_end in families.items():
            assert f"{family} {back_end}" in " ".join(text.split())
    for entry in facts["missing"]:
        assert entry["remedy"] in text


def test_kernels_that_were_not_built_are_missing_and_not_in_use():
    result = subprocess.run(
        [sys.executable, "-m", "softgrpo.cli.env", "--json"],
        env=os.environ | {"SOFTGRPO_NO_EXT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(result.stdout)
    assert {"what": "C++ kernels", "remedy": "unset SOFTGRPO_NO_EXT"} in facts["missing"]
    assert "C++" not in str(facts["back_ends"]["cpu"])
    assert result.stderr == ""
