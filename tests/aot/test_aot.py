"""Machine code of every Triton kernel for GPUs of three generations of NVIDIA and one of AMD."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

from aot import specs, violations
from aot_controls import CONTROLS, VARIANTS
from aot_variants import distinct

SPECS = specs()


@pytest.fixture(scope="session")
def facts(pytestconfig):
    """What aot.py prints. A second run takes the binaries from a cache."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
    # Another process: here Triton may be an interpreter.
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "aot.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _cases(chosen):
    return [
        pytest.param(spec, target, id=f"{spec.name}-{target}".replace(" ", "-"))
        for spec in chosen
        for target in spec.targets
    ]


def test_names_of_specs_are_unique():
    names = [spec.name for spec in SPECS]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(("spec", "target"), _cases(SPECS))
def test_machine_code(facts, spec, target):
    found = facts["code"][spec.name][target]
    wrong = violations(spec, target, found)
    assert not wrong, "\n".join([*wrong, json.dumps(found, indent=1)])


@pytest.mark.parametrize("spec", distinct(SPECS), ids=lambda spec: spec.name.replace(" ", "-"))
def test_every_variant_of_the_jit_lowers(facts, spec):
    """Each specialised integer equal to 1, and all a multiple of 16 or not, the other way round."""
    wrong = [f"{name}:\n{why}" for name, why in facts["variants"][spec.name].items() if why]
    assert not wrong, "\n".join(wrong)


def test_a_variant_that_does_not_compile_is_seen(facts):
    for spec in VARIANTS:
        found = facts["variants"][spec.name]
        assert list(found) == ["size = 1", "other alignments"]
        assert "object has no attribute 'to'" in found["size = 1"]
        assert found["other alignments"] is None


@pytest.mark.parametrize(("spec", "complaint"), CONTROLS, ids=[s.name for s, _ in CONTROLS])
def test_a_bad_kernel_is_refused(facts, spec, complaint):
    for target in spec.targets:
        wrong = violations(spec, target, facts["code"][spec.name][target])
        assert any(complaint in w for w in wrong), (target, wrong)
