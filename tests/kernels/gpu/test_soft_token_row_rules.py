"""Parameters in tensors on a device, where nobody may look: a bad row is marked, as the reference
marks it."""

import pytest
import torch
import triton
import triton.language as tl
from gpu_cases import poisoned
from row_cases import BAD, GOOD, INF, NAN

from softgrpo_kernels.gpu import soft_token as gpu
from softgrpo_kernels.gpu.soft_token.row import MODE, SKIP, Row, int_of
from softgrpo_kernels.gpu.soft_token.row_rules import row_is_sound
from softgrpo_kernels.reference import soft_token as reference
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_token_tensors import SoftTokenInputs

ROWS = [{}, *BAD, *GOOD, {"uid": -1, "temperature": 0.0, "mode": SKIP.value}]


def tables(device, cases=ROWS):
    """A row for every case, in tables that nobody has checked."""
    good = {
        "temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "gumbel_tau": 0.1,
        "noise_scale": 1.0, "noise_clamp": (-torch.inf, torch.inf), "weight_floor": 0.0,
        "eps": 0.0, "seed": 0,
        "position": 0, "uid": 0, "stream": 0, "mode": 2, "noise": 0,
    }  # fmt: skip
    columns = {name: torch.tensor([(good | row)[name] for row in cases]) for name in good}
    return RowParameters.pack(len(cases), torch.device(device), 8, **columns)


@triton.jit
def sound_kernel(out, floats, ints, batch, k_max):
    row = Row(floats, ints, batch, tl.program_id(0), 0, k_max)
    sound = row_is_sound(row) | (int_of(row, MODE) == SKIP)
    tl.store(out + row.index, sound.to(tl.int32))


def test_the_kernels_have_the_rules_of_the_reference(device):
    rows = tables(device)
    out = torch.full((len(ROWS),), -1, dtype=torch.int32, device=device)
    sound_kernel[(len(ROWS),)](out, rows.floats, rows.ints, len(ROWS), rows.k_max)
    for row, ours, theirs in zip(ROWS, out.tolist(), rows.sound.tolist(), strict=True):
        assert (bool(ours), theirs) == (row not in BAD,) * 2, row


def test_bad_rows_are_marked_and_hold_what_skipped_ones_do(device):
    chosen = [{}, {"top_k": -1}, {"temperature": 0.0}, {"gumbel_tau": 0.0}, {"uid": -1}]
    chosen += [{"temperature": NAN, "mode": 1, "top_k": -1}, {"noise": 4, "noise_scale": INF}]
    rows = tables(device, chosen)
    logits, embed = torch.randn(7, 40, device=device), torch.randn(40, 4, device=device)
    for run in (reference.soft_token, gpu.soft_token):
        out = poisoned(logits, 8, embed)
        run(SoftTokenInputs(logits, embed), rows, out)
        assert out.valid.tolist() == [True] + [False] * 6
        bad = slice(1, None)
        assert out.token[0] >= 0
        assert (out.token[bad] == -1).all()
        assert (out.ids[bad] == -1).all()
        assert (out.n[bad] == 0).all()
        assert not out.kind[bad].any()
        assert not out.embed[bad].any()
        assert not out.weights[bad].any()
        assert out.lse[bad].isnan().all()


def test_the_cpu_refuses_what_a_device_marks():
    rows = tables("cpu")
    assert rows.sound.tolist() == [row not in BAD for row in ROWS]
    for i, row in enumerate(ROWS):
        one = RowParameters(rows.floats[:, i : i + 1], rows.ints[:, i : i + 1], 8)
        if row in BAD:
            with pytest.raises(ValueError, match=r"must|needs"):
                one.check()
        else:
            one.check()


def test_bad_rows_add_no_mass_outside_of_their_histogram(device, monkeypatch):
    """Below a temperature of 0 a bin has a negative number, that of rows before this one."""
    limits = {"mode": 1, "top_k": -1, "top_p": 1.0, "min_p": 0.5}
    cases = [limits | {"temperature": t} for t in (1.0, -1.0)]
    histograms = []

    def seen(*arguments):
        histograms.append(arguments[4])
        return collect(*arguments)

    collect = gpu.collect
    monkeypatch.setattr(gpu, "collect", seen)
    embed = torch.randn(4096, 4, device=device)
    for count in (1, 2):
        logits = torch.linspace(0.0, 2.0, 4096, device=device).expand(count, 4096)
        inputs = SoftTokenInputs(logits, embed)
        gpu.soft_token(inputs, tables(device, cases[:count]), poisoned(logits, 8, embed))
    alone, beside = histograms
    assert torch.equal(alone[0], beside[0])
    assert not beside[1].any()
