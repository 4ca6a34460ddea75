"""Every stand-in of a kernel of soft tokens against that kernel, in launches of our wrappers."""

import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl

from simulated_gpu.launches import (
    DTYPES,
    STAND_INS,
    Cases,
    assert_same_arguments,
    launched,
    launches,
    poison,
)
from simulated_gpu.stand_ins import perturb
from softgrpo_kernels import RowParameters, SoftToken, gpu, linear_logprob_slices, soft_token
from softgrpo_kernels.gpu import indexed_dot as indexed
from softgrpo_kernels.gpu import linear_logprob as logprob
from softgrpo_kernels.gpu import soft_token as gpu_step
from softgrpo_kernels.gpu.gumbel_noise import gumbel_noise
from softgrpo_kernels.gpu.row_parameters import fill_rows
from softgrpo_kernels.gpu.soft_embedding import soft_embedding
from softgrpo_kernels.gpu.soft_token import full_vocabulary as whole_rows
from softgrpo_kernels.gpu.soft_token import lm_head
from softgrpo_kernels.linear_logprob_slices import LogitMap, TokenGradients
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.noise import log_gamma_noise
from softgrpo_kernels.record_step import draw_into_record, record_mixtures
from softgrpo_kernels.record_tables import Drawn, RecordTables
from softgrpo_kernels.row_rules import DISCRETE, GREEDY, SKIP, SOFT, RowValues
from softgrpo_kernels.soft_token_tensors import SoftTokenInputs

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from logit_styles import logits_of

__all__ = ["launches", "poison"]  # fixtures

# numpy's, of the kernels: infinities and NaN are part of the cases.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KERNELS = launched(gpu)
CASES = Cases()
reaches, assert_reached = CASES.reaches, CASES.assert_reached


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Narrow tiles of the LM head."""
    monkeypatch.setattr(lm_head, "ROWS", 4)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_arguments_are_the_kernel_s(name):
    assert_same_arguments(name, KERNELS[name])


def test_every_kernel_has_a_stand_in_and_a_case():
    assert set(KERNELS) <= set(STAND_INS)
    assert set().union(*CASES.reached.values()) == set(KERNELS)


def test_every_stand_in_has_a_kernel():
    from softgrpo_engine.ops import gpu as engine

    assert set(STAND_INS) == set(KERNELS) | set(launched(engine))


# The soft step.

STATISTICS = ("statistics.statistics_kernel",)
LM_HEAD = ("lm_head.lm_head_kernel", "lm_head.combine_kernel")
SAMPLE = ("sample.sample_kernel",)
STEP = ("full_vocabulary.collect_kernel", *SAMPLE)


def poisoned(source, embed, k_max, statistics):
    layout = SoftToken.layout(source, k_max, embed, *[statistics] * 3)
    return SoftToken(**{n: s and torch.full(s[1], -7.0).to(s[0]) for n, s in layout.items()})


def step(logits, *, k_max=4, statistics=True, width=9, **settings):
    embed = torch.randn(logits.shape[1], width).to(logits.dtype)
    out = poisoned(logits, embed, k_max, statistics)
    return soft_token(
        logits, embed, k_max=k_max, backend="triton", out=out, need_lse=statistics,
        need_entropy=statistics, need_kept_mass=statistics, **settings,
    )  # fmt: skip


def step_from_hidden(hidden, head, *, k_max=4, statistics=True, **settings):
    embed = torch.randn(len(head), 9)
    return soft_token(
        None, embed, hidden=hidden, lm_head=head, k_max=k_max, backend="triton",
        need_lse=statistics, need_entropy=statistics, need_kept_mass=statistics, **settings,
    )  # fmt: skip


def every_mode():
    return {
        "mode": torch.tensor([GREEDY, DISCRETE, SOFT, SKIP, SOFT, SOFT, DISCRETE]),
        "top_k": torch.tensor([0, 3, 4, 0, 4, 3, -1]),
        "top_p": torch.tensor([1, 0.9, 0.95, 1, 1, 0.8, 1]),
        "min_p": torch.tensor([0, 0, 0, 0, 0.01, 0, 0]),
        "temperature": torch.tensor([0, 0.7, 1, 0, 1.3, 1, 0.9]),
        "gumbel_tau": torch.tensor([0.1, 0.1, 0.1, 0.1, 1, 1, 1]),
        "weight_floor": torch.tensor([0, 0, 0.1, 0, 0.01, 1, 1]),
        "eps": torch.tensor([0, 0, 1e-6, 0, 0, 0, 0]),
        "noise_scale": torch.tensor([1, 1, 0.5, 1, 2, 1, 1]),
        "noise_clamp": torch.tensor([[-1.5, 3.0]]).expand(7, 2),
        "seed": 2**41 + 5,
        "position": torch.arange(7),
        "uid": torch.arange(7) + 2**32 - 7,
    }


@reaches("row_parameters.fill_rows_kernel")
@pytest.mark.parametrize("rows", [3, 300])
def test_parameters_of_rows(launches, rows):
    """Numbers, large ones and those that a compiler would treat apart; tensors of other dtypes."""
    values = RowValues(
        temperature=0.7, top_p=1, tau=torch.rand(rows).bfloat16().float(), reach=torch.inf,
        noise_scale=torch.rand(rows).double(), clamp_low=torch.randn(rows, 2)[:, 1],
        eps=torch.tensor(1e-6), top_k=5, seed=-(2**62), position=torch.arange(rows).short(),
        uid=2**32 - 1, stream=torch.tensor([7]), mode=1,
    )  # fmt: skip
    floats, ints = torch.empty(9, rows), torch.empty(7, rows, dtype=torch.int64)
    fill_rows(floats, ints, values)
    for column, value in zip([*floats, *ints], values, strict=True):
        assert torch.equal(column, torch.as_tensor(value).to(column.dtype).expand(rows))
    assert_reached(test_parameters_of_rows, launches)


@reaches(*STATISTICS, *STEP)
def test_every_mode(launches):
    """Rows at odd distances; a terminal id that ends a soft row; top-p of the whole row's mass."""
    logits = logits_of("plain", 7, 303)[:, 3:]
    free = soft_token(logits, k_max=4, order="joint", **every_mode(), backend="reference")
    terminal = torch.full((7, 2), -1)
    terminal[4, 1] = free.token[4]
    out = step(logits, terminal_ids=terminal, order="joint", **every_mode())
    assert out.kind.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert_reached(test_every_mode, launches)


@reaches(*STATISTICS, *SAMPLE)
def test_every_noise(launches):
    step(
        logits_of("plain", 6, 200), top_k=4, top_p=0.9, noise=torch.tensor([0, 1, 2, 3, 4, 2]),
        noise_scale=torch.tensor([1.0, 1.0, 4.0, 0.1, 3.0, 0.5]), gumbel_tau=1.0,
        position=torch.arange(6), eps=torch.tensor([0.0, 0.0, 1e-6, 0.0, 0.0, 0.0]),
        statistics=False,
    )  # fmt: skip
    assert_reached(test_every_noise, launches)


def test_candidates(launches):
    """Fewer tokens than slots; more tiles than slots, of which the best are searched; chunks."""
    styles = ["equal", "one"]
    step(torch.cat([logits_of(style, 1, 3) for style in styles]), top_k=3, top_p=0.913)
    styles = ["integers", "masked", "signed zeros"]
    logits = torch.cat([logits_of(style, 1, 700, torch.bfloat16) for style in styles])
    step(logits, k_max=2, top_k=2)
    logits = logits_of("integers", 2, 4200, torch.float16)
    step(logits, k_max=2, top_k=2, mode=torch.tensor([GREEDY, SOFT]))


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "logit_scale": 0.5}])
def test_candidates_are_scored_again_by_the_head(launches, options):
    hidden, head = torch.randn(70, 2).T, torch.randn(70, 300).T
    bias = torch.randn(300) if options else None
    step(
        hidden @ head.T, k_max=2, top_k=2, temperature=9.0, hidden=hidden, lm_head=head, bias=bias,
        statistics=False, **options,
    )  # fmt: skip


def test_bad_rows(launches):
    logits = logits_of("plain", 6, 300)
    logits[0, 299], logits[1, 0], logits[2], logits[3], logits[5, 7] = (
        torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan,
    )  # fmt: skip
    mode = torch.tensor([SOFT, DISCRETE, SOFT, SKIP, SOFT, DISCRETE])
    top_k = torch.tensor([2, 2, 2, 2, 2, -1])
    out = step(logits, k_max=2, top_k=top_k, mode=mode)
    assert out.valid.tolist() == [False] * 3 + [True] * 2 + [False]


def test_rows_that_break_a_rule(launches):
    """On a device nobody looks at them before the kernels do; what is out of range in one row is
    of no concern to another."""
    faults = {
        "temperature": (1, 0.0), "gumbel_tau": (2, 0.0), "top_k": (3, 5), "min_p": (4, 1.5),
        "noise": (5, 9), "uid": (6, -1), "mode": (7, 9), "top_p": (8, torch.nan),
        "noise_scale": (9, torch.inf), "weight_floor": (10, 1.5),
    }  # fmt: skip
    settings = {name: torch.tensor([x] * 11) for name, x in SOUND.items()}
    for name, (row, value) in faults.items():
        settings[name][row] = value
    settings["mode"][8] = DISCRETE
    rows = RowParameters.pack(11, torch.device("cpu"), 2, noise_clamp=None, **settings)
    logits, embed = logits_of("plain", 11, 100), torch.randn(100, 9)
    out = poisoned(logits, embed, 2, True)
    gpu_step.soft_token(SoftTokenInputs(logits, embed), rows, out)
    assert out.valid.tolist() == [True] + [False] * 10


SOUND = {
    "temperature": 0.7, "top_p": 1.0, "min_p": 0.0, "gumbel_tau": 0.1, "noise_scale": 1.0,
    "weight_floor": 0.0, "eps": 0.0, "top_k": 2, "seed": 1, "position": 2, "uid": 3, "stream": 0,
    "mode": SOFT, "noise": 0,
}  # fmt: skip


def whole_vocabulary(logits, **settings):
    return step(logits, k_max=2, mode=DISCRETE, temperature=0.9, **settings)


def test_rows_over_the_whole_vocabulary(launches, monkeypatch):
    """Nothing, top-p, both, min-p, a top-k of everything; two rounds of the programs that draw."""
    monkeypatch.setattr(whole_rows, "DRAW_BLOCK", tl.constexpr(64))
    whole_vocabulary(
        logits_of("integers", 5, 200), uid=torch.arange(5),
        top_p=torch.tensor([1, 0.8317, 0.913, 1, 1]), min_p=torch.tensor([0, 0, 0, 0.05, 0]),
        top_k=torch.tensor([-1, -1, 50, -1, 10**6]),
    )  # fmt: skip
    whole_vocabulary(logits_of("plain", 1, 200), order="joint", top_k=30, top_p=0.7, min_p=0.02)


def test_a_nucleus_that_overflows_its_list(launches, monkeypatch):
    """And one beside it that does not."""
    monkeypatch.setattr(whole_rows, "CAPACITY", tl.constexpr(40))
    whole_vocabulary(logits_of("plain", 2, 200), top_p=torch.tensor([0.9, 0.1]))


@reaches(*LM_HEAD, *STEP)
def test_from_hidden_states(launches):
    hidden, head, bias = torch.randn(5, 40), torch.randn(300, 40), torch.randn(300)
    hidden[3, 3] = torch.nan
    step_from_hidden(
        hidden, head, bias=bias, softcap=20.0, logit_scale=0.5,
        mode=torch.tensor([GREEDY, SOFT, SKIP, SOFT, DISCRETE]), k_max=2,
        temperature=torch.tensor([0, 0.7, 0, 1, 1]), top_k=torch.tensor([0, 2, 0, 2, -1]),
    )  # fmt: skip
    # Sums that are exact; a table whose rows lie apart, from its third row on.
    hidden, head = (torch.randint(-2, 3, (n, 43)).bfloat16() for n in (2, 132))
    step_from_hidden(
        hidden[:, 3:], head[3:, 3:], top_k=2, temperature=9.0, k_max=2, statistics=False
    )
    assert_reached(test_from_hidden_states, launches)


@reaches(*STATISTICS, *STEP, "mixture.record_mixture_kernel")
def test_rows_of_a_record(launches):
    """In another order, one of them twice as the rows that pad a batch are; a soft row that ends;
    mixtures of soft, discrete and empty positions."""
    rows, capacity, slots, vocabulary = 4, 3, 3, 200
    columns = {
        "mode": [DISCRETE, GREEDY, DISCRETE, SKIP, SOFT, SOFT, SOFT, SKIP],
        "top_k": [-1, 0, 2, 0, 3, 3, 3, 0], "uid": [0, 1, 2, 3] * 2,
        "gumbel_tau": [1.0] * 4 + [0.5, 0.1, 0.1, 1.0], "weight_floor": [0.0] * 5 + [0.1, 0, 0],
    }  # fmt: skip
    settings = SOUND | {name: torch.tensor(values) for name, values in columns.items()}
    draws = RowParameters.pack(8, torch.device("cpu"), slots, noise_clamp=None, **settings)
    record = RecordTables(
        draws,
        torch.tensor([0, 1, 1, 0], dtype=torch.uint8),
        torch.full((rows, 1), -1, dtype=torch.int32),
        Drawn.empty(rows, capacity, slots, torch.device("cpu"), kept_mass=True),
    )
    row, step = torch.tensor([2, 0, 3, 1, 3]), torch.tensor([1, 0, 1, 2, 1])
    drawn = torch.empty(3, 5, dtype=torch.int64)
    head = LMHead(torch.randn(5, 20), torch.randn(vocabulary, 20))
    for _ in range(2):
        logits = logits_of("plain", 5, vocabulary)
        draw_into_record(record, row, step, logits, drawn, head=head, backend="triton")
        record.terminal_ids[1] = record.drawn.token[1, 2]
    assert drawn[1].tolist() == [1, 0, 0, 1, 0]
    record_mixtures(record, row, step + 1, torch.randn(vocabulary, 9), before=1, backend="triton")
    record_mixtures(record, row, step * 0, torch.randn(vocabulary, 9), backend="triton")
    assert_reached(test_rows_of_a_record, launches)


# Noise, mixtures and the ops of the trainer.


@reaches("gumbel_noise.gumbel_noise_kernel")
def test_noise(launches):
    ids = torch.randint(-3, 300_000, (3, 300), dtype=torch.int32)
    keys = torch.randint(0, 2**32, (4, 3))
    keys[0] -= 2**31
    gumbel_noise(ids, *keys)
    assert_reached(test_noise, launches)


def test_attempts_at_once_have_the_bits_of_attempts_in_turn():
    ids, shapes = torch.randint(0, 300_000, (20, 50)), torch.randn(20, 50).mul(3).exp()
    keys = (torch.arange(20) + 2**40, torch.arange(20), torch.arange(20), torch.zeros(20).long())
    expected = log_gamma_noise(ids, shapes, *keys)
    assert torch.equal(perturb._log_gamma(ids, shapes, keys), expected)


def strided(*shape, dtype=torch.float32):
    """Rows further apart than they are long."""
    return torch.randn(shape[0], shape[1] + 3).to(dtype)[:, 3:]


@reaches("indexed_dot.indexed_dot_kernel", "soft_embedding.soft_embedding_kernel")
@pytest.mark.parametrize(("slots", "width"), [(5, 70), (9, 600)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_indexed_dot(launches, dtype, slots, width):
    hidden, table = strided(4, width, dtype=dtype), strided(30, width, dtype=dtype)
    ids, grad = torch.randint(-2, 30, (4, slots)), torch.randn(4, slots)
    grad[0, :2] = 0.0
    indexed.indexed_dot(hidden, table, ids)
    indexed.indexed_dot_backward_hidden(grad, table, ids, torch.float32)
    soft_embedding(ids.view(2, 2, slots), grad.view(2, 2, slots), table)
    assert_reached(test_indexed_dot, launches)


@reaches("indexed_dot.piece_sums_kernel", "indexed_dot.join_pieces_kernel")
@pytest.mark.parametrize("spread", ["all", "few", "one", "none"])
def test_sums_over_rows_of_a_table(launches, monkeypatch, spread):
    monkeypatch.setattr(indexed, "PIECE", 4)
    for dtype in DTYPES:
        hidden, grad = strided(9, 20, dtype=dtype), torch.randn(9, 3)
        ids = torch.randint(-2, 40, (9, 3)).clamp(min=-1)
        ids = {"all": ids, "few": ids % 3, "one": ids * 0 + 7, "none": ids * 0 - 1}[spread]
        indexed.indexed_dot_add_to_table(strided(40, 20, dtype=dtype), grad, hidden, ids)
    assert_reached(test_sums_over_rows_of_a_table, launches)


@reaches("linear_logprob.accumulate_kernel", "linear_logprob.differentiate_kernel")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("with_bias", "softcap", "scale"), [(False, None, 1.0), (True, 5.0, 0.7)])
def test_token_logprob(launches, monkeypatch, with_bias, softcap, scale, entropy):
    """Several slices; the last case has a vocabulary of several blocks."""
    monkeypatch.setattr(linear_logprob_slices, "_CHUNK_ELEMENTS", 2048)
    hidden, head = torch.randn(3, 8), torch.randn(1400, 8)
    label = torch.tensor([3, 1399, 0])
    bias = torch.randn(1400) if with_bias else None
    temperature = torch.tensor([[0.7], [1.0], [2.0]])
    logit_map = LogitMap(bias, temperature, softcap, scale)
    grads = torch.randn(3, 3)
    results = logprob.token_logprob(hidden, head, label, logit_map, need_entropy=entropy)
    logprob.token_logprob_backward(
        TokenGradients(*grads[:2], grads[2] if entropy else None), hidden, head,
        label, logit_map, *results[1:], need_hidden=True, d_weight=torch.zeros(1400, 8),
        d_bias=torch.zeros(1400) if with_bias else None,
    )  # fmt: skip
    assert_reached(test_token_logprob, launches)
    dots, state = torch.randn(1, 2500), torch.zeros(4, 1)
    state[0] = -torch.inf
    logprob.accumulate(
        dots, 7, None, temperature[0], label[:1], state, softcap=None, logit_scale=1.0,
        need_entropy=True,
    )  # fmt: skip
