"""The columns of the rows' parameters: one list, the same in Python, C++ and Triton."""

import importlib.util
import math

import pytest
import torch

from softgrpo_kernels import RowParameters
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.row_rules import FLOAT_COLUMNS, INT_COLUMNS, RowValues


def test_the_tables_hold_all_parameters_in_order():
    assert RowValues._fields == FLOAT_COLUMNS + INT_COLUMNS
    floats = torch.arange(len(FLOAT_COLUMNS) * 3.0).view(-1, 3)
    ints = torch.arange(len(INT_COLUMNS) * 3).view(-1, 3)
    rows = RowParameters(floats, ints, 8)
    for table, columns in ((floats, FLOAT_COLUMNS), (ints, INT_COLUMNS)):
        for place, name in enumerate(columns):
            assert torch.equal(getattr(rows, name), table[place]), name


def test_pack_puts_every_argument_into_its_column():
    arguments = {
        "temperature": 1.0, "top_p": 2.0, "min_p": 0.3, "gumbel_tau": 4.0,
        "weight_floor": 0.5, "noise_scale": 5.0,
        "noise_clamp": (-6.0, 7.0), "eps": 8.0, "top_k": 9, "seed": 10, "position": 11, "uid": 12,
        "stream": 13, "mode": 1, "noise": "none",
    }  # fmt: skip
    rows = RowParameters.pack(2, torch.device("cpu"), 16, **arguments)
    values = RowValues(
        1.0, 2.0, 0.3, 4.0, 4.0 * math.log(2.0), 5.0, -6.0, 7.0, 8.0, 9, 10, 11, 12, 13, 1, 1
    )
    assert torch.equal(rows.floats, torch.tensor(values.floats)[:, None].expand(-1, 2))
    assert torch.equal(rows.ints, torch.tensor(values.ints)[:, None].expand(-1, 2))


@pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
def test_cpp_has_the_same_columns():
    assert tuple(cpu_extension().FLOAT_COLUMNS) == FLOAT_COLUMNS
    assert tuple(cpu_extension().INT_COLUMNS) == INT_COLUMNS


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_triton_has_the_same_columns():
    from softgrpo_kernels.gpu.soft_token import row

    for columns in (FLOAT_COLUMNS, INT_COLUMNS):
        for place, name in enumerate(columns):
            assert getattr(row, name.upper()).value == place, name
