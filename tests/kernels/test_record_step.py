"""A decode step on the tables of an engine: the plain steps and the kernels."""

import importlib.util

import pytest
import torch
from logit_styles import logits_of

from softgrpo_kernels import RowParameters, soft_embedding, soft_token
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.record_step import draw_into_record, record_mixtures
from softgrpo_kernels.record_tables import Drawn, RecordTables
from softgrpo_kernels.row_rules import DISCRETE, GREEDY, SKIP, SOFT

ROWS, STEPS, SLOTS, VOCABULARY = 9, 4, 5, 300
# As each row draws discretely: greedy, from its slots, from the vocabulary and parts of it.
DISCRETELY = [
    {"mode": GREEDY}, {"top_k": 3}, {}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}, {"top_k": 5},
    {"min_p": 0.02}, {"top_k": 2}, {"mode": SKIP},
]  # fmt: skip
SOFTLY = {"top_k": 4, "top_p": 0.95, "gumbel_tau": 0.7, "mode": SOFT, "weight_floor": 0.1}
DEFAULTS = {
    "temperature": 0.9, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "gumbel_tau": 1.0,
    "weight_floor": 0.0, "noise_scale": 1.0, "eps": 0.0, "seed": 5, "position": 7, "uid": 0,
    "stream": 0, "mode": DISCRETE, "noise": 0,
}  # fmt: skip
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
)


def settings():
    discrete = [DEFAULTS | {"uid": row} | one for row, one in enumerate(DISCRETELY)]
    soft = [one | (SOFTLY if one["mode"] != SKIP else {}) for one in discrete]
    return [*discrete, *soft]


def new_record(soft, *, keeps_mass=True):
    columns = {name: torch.tensor([one[name] for one in settings()]) for name in DEFAULTS}
    draws = RowParameters.pack(2 * ROWS, torch.device("cpu"), SLOTS, noise_clamp=None, **columns)
    shape = (ROWS, STEPS)
    return RecordTables(
        draws,
        torch.tensor(soft, dtype=torch.uint8),
        torch.full((ROWS, 2), -1, dtype=torch.int32),
        Drawn(
            torch.full((*shape, SLOTS), -7, dtype=torch.int32),
            torch.full((*shape, SLOTS), -7.0),
            torch.full(shape, 7, dtype=torch.uint8),
            torch.ones(shape, dtype=torch.bool),
            torch.full(shape, -7, dtype=torch.int32),
            torch.full(shape, -7.0),
            torch.full((ROWS, STEPS * keeps_mass), -7.0),
        ),
    )


def copy_of(record):
    drawn = Drawn(*(table.clone() for table in record.drawn))
    return RecordTables(record.draws, record.soft.clone(), record.terminal_ids.clone(), drawn)


@pytest.fixture
def step():
    """(record, rows in another order, their steps, logits, head); phases are mixed."""
    torch.manual_seed(0)
    record = new_record([1, 0, 0, 0, 0, 1, 0, 1, 1])
    row = torch.tensor([4, 0, 8, 2, 7, 3, 6, 1])
    index = torch.tensor([1, 2, 1, 0, 3, 2, 0, 1])
    logits = logits_of("plain", len(row), VOCABULARY).bfloat16()
    hidden, head = torch.randn(len(row), 24), torch.randn(VOCABULARY, 24)
    return record, row, index, logits, LMHead(hidden.bfloat16(), head.bfloat16())


def drawn_alone(record, row, index, logits, head, **options):
    """What `soft_token` draws with the parameters of the row's phase."""
    one = settings()[row + ROWS * int(record.soft[row])]
    one = one | {"position": one["position"] + index}
    return soft_token(
        logits[None], hidden=head.hidden, lm_head=head.weight, k_max=SLOTS, need_kept_mass=True,
        terminal_ids=record.terminal_ids[row][None], backend="reference", **one, **options,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto", TRITON])
def test_a_step_is_that_of_every_row_alone(step, backend):
    record, row, index, logits, head = step
    first = drawn_alone(record, 7, 3, logits[4], LMHead(head.hidden[4:5], head.weight))
    record.terminal_ids[7, 1] = first.token
    before = copy_of(record)
    drawn = torch.full((3, len(row)), -7)
    draw_into_record(record, row, index, logits, drawn, head=head, backend=backend)
    for b, (r, i) in enumerate(zip(row.tolist(), index.tolist(), strict=True)):
        alone = drawn_alone(before, r, i, logits[b], LMHead(head.hidden[b : b + 1], head.weight))
        assert drawn[:, b].tolist() == [int(alone.token), int(alone.kind), int(alone.valid)]
        found = Drawn(*(table[r, i] for table in record.drawn))
        assert torch.equal(found.ids, alone.ids[0])
        for ours, theirs in (
            (found.gprime, alone.gprime[0]), (found.logprob, alone.token_logp[0]),
            (found.kept_mass, alone.kept_mass[0]),
        ):  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=1e-5, equal_nan=True)
        assert found.token == alone.token
        assert found.kind == alone.kind == record.soft[r]
        assert not found.forced
    assert drawn[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]  # row 7 has ended
    # Nothing else has changed: not another position, nor a row that was not drawn.
    others = torch.ones(ROWS, STEPS, dtype=torch.bool)
    others[row, index] = False
    for ours, theirs in zip(record.drawn, before.drawn, strict=True):
        assert torch.equal(ours[others], theirs[others])
    assert record.soft[5] == 1


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_a_record_without_masses_and_ends(step, backend):
    record, row, index, logits, _ = step
    record = new_record(record.soft.tolist(), keeps_mass=False)
    record = record._replace(terminal_ids=record.terminal_ids[:, :0].contiguous())
    expected, drawn = copy_of(record), torch.empty(2, 3, len(row), dtype=torch.int64)
    draw_into_record(expected, row, index, logits, drawn[0], backend="reference")
    draw_into_record(record, row, index, logits, drawn[1], backend=backend)
    assert torch.equal(*drawn)
    assert torch.equal(record.soft, expected.soft)
    for ours, theirs in zip(record.drawn, expected.drawn, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_what_was_promised_to_be_listed(step, backend):
    """Rows that are give the same; one that is not draws nothing on a GPU, and is valid."""
    record, row, index, logits, head = step
    expected, drawn = copy_of(record), torch.empty(2, 3, len(row), dtype=torch.int64)
    draw_into_record(expected, row, index, logits, drawn[0], head=head, backend=backend)
    draw_into_record(
        record, row, index, logits, drawn[1], head=head, backend=backend, unlisted=False
    )
    unlisted = torch.tensor([r in (2, 3, 4, 6) for r in row.tolist()])
    assert torch.equal(drawn[0][:, ~unlisted], drawn[1][:, ~unlisted])
    if backend == "triton":
        assert drawn[1][0, unlisted].tolist() == [-1] * 4
    assert drawn[1][2].all()


@pytest.mark.parametrize("backend", ["auto", TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_have_the_bits_of_soft_token_and_soft_embedding(step, backend, dtype):
    record, row, index, logits, head = step
    table = torch.randn(VOCABULARY, 531).to(dtype)[:, 2:]
    expected = []
    for b, (r, i) in enumerate(zip(row.tolist(), index.tolist(), strict=True)):
        alone = drawn_alone(record, r, i, logits[b], LMHead(head.hidden[b : b + 1], head.weight))
        record.drawn.ids[r, i], record.drawn.gprime[r, i], record.drawn.kind[r, i] = (
            x[0] for x in (alone.ids, alone.gprime, alone.kind)
        )
        expected.append(soft_embedding(alone.ids, alone.weights, table))
    assert record.drawn.kind[row, index].sum() > 1
    for before in (0, 2):
        mixed = record_mixtures(record, row, index + before, table, before=before, backend=backend)
        assert torch.equal(mixed, torch.cat(expected))


def test_no_rows():
    record, none = new_record([0] * ROWS), torch.empty(0, dtype=torch.int64)
    drawn = torch.empty(3, 0, dtype=torch.int64)
    for backend in ("auto", "reference"):
        draw_into_record(record, none, none, torch.empty(0, 9), drawn, backend=backend)
    assert record_mixtures(record, none, none, torch.randn(9, 6)).shape == (0, 6)
