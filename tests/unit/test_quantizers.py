"""RTN and OPTQ, code for code against the textbook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from slimtune.errors import CalibrationError, RecipeError, ShapeError
from slimtune.linalg.packing import unpack
from slimtune.quant.base import QTensor
from slimtune.quant.optq import Optq, _spans
from slimtune.quant.rtn import Rtn

SHAPES = [(37, 16), (100, 48), (200, 160), (200, -1), (300, 48), (300, 160)]
"""Columns and group size: odd, short last groups, groups wider than a block of columns, and more than one block."""

each_shape = pytest.mark.parametrize(("columns", "group"), SHAPES)
each_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])
each_grid = pytest.mark.parametrize("grid", ["minmax", "mse"])
each_sign = pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
each_order = pytest.mark.parametrize("desc_act", [False, True], ids=["in-order", "desc-act"])


def weight_of(columns: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64) * 0.05 + 0.01


def hessian_of(columns: int) -> Tensor:
    """Of inputs with a mean, strongly dependent features, and features of very different size."""
    x = torch.randn(2 * columns, columns, dtype=torch.float64)
    x = x + 2 * torch.randn(2 * columns, 8, dtype=torch.float64) @ torch.randn(8, columns, dtype=torch.float64) + 0.5
    x = x * torch.exp(0.7 * torch.randn(columns, dtype=torch.float64))
    return x.T @ x / len(x)


def parts(q: QTensor) -> oracles.Quantized:
    layout: Any = q.layout
    codes = unpack(q.tensors["codes"], layout.bits, layout.in_features)
    scale = q.tensors["scale"].double()
    zero = torch.full_like(scale, 2 ** (layout.bits - 1)) if layout.symmetric else q.tensors["zero"].double()
    return oracles.Quantized(codes.numpy(), scale.numpy(), zero.numpy())


def assert_equal(q: QTensor, wanted: oracles.Quantized, group: int) -> None:
    for got, want, what in zip(parts(q), wanted, oracles.Quantized._fields, strict=True):
        assert got.shape == want.shape, what
        assert np.array_equal(got, want), f"{what} differ at {np.argwhere(got != want)[:5].tolist()}"
    dense = oracles.affine(wanted, group)
    assert np.array_equal(q.dequantize(torch.float64).numpy(), dense)
    assert np.array_equal(q.dequantize(torch.float32).numpy(), dense.astype(np.float32))


@each_shape
@each_bits
@each_grid
@each_sign
def test_rtn_is_the_textbook(columns: int, group: int, bits: int, grid: Any, sym: bool) -> None:
    w = weight_of(columns)
    q = Rtn(bits=bits, group_size=group, sym=sym, grid=grid)(w, {})
    assert_equal(q, oracles.rtn(w.numpy(), bits, group, sym, grid), group)


@each_shape
@each_bits
@each_grid
@each_sign
@each_order
def test_optq_is_the_textbook(columns: int, group: int, bits: int, grid: Any, sym: bool, desc_act: bool) -> None:
    w, h = weight_of(columns), hessian_of(columns)
    q = Optq(bits=bits, group_size=group, sym=sym, grid=grid, desc_act=desc_act, refine=0)(w, {"hessian": h})
    assert_equal(q, oracles.gptq(w.numpy(), h.numpy(), bits, group, sym, grid, 0.01, desc_act), group)


@each_order
@pytest.mark.parametrize("damp", [0.003, 0.2])
def test_optq_damps_as_told(damp: float, desc_act: bool) -> None:
    w, h = weight_of(64), hessian_of(64)
    q = Optq(bits=3, group_size=32, desc_act=desc_act, damp_percent=damp, refine=0)(w, {"hessian": h})
    assert_equal(q, oracles.gptq(w.numpy(), h.numpy(), 3, 32, False, "mse", damp, desc_act), 32)


@each_order
def test_the_oracle_tells_orders_and_grids_apart(desc_act: bool) -> None:
    """The cases above would show a mistake: other settings give other codes, and error feedback more than RTN."""
    w, h = weight_of(100).numpy(), hessian_of(100).numpy()
    codes = oracles.gptq(w, h, 3, 48, False, "mse", 0.01, desc_act).codes
    others = [
        oracles.gptq(w, h, 3, 48, False, "mse", 0.01, not desc_act),
        oracles.gptq(w, h, 3, 48, False, "minmax", 0.01, desc_act),
        oracles.gptq(w, h, 3, 48, False, "mse", 0.5, desc_act),
        oracles.rtn(w, 3, 48, False, "mse"),
    ]
    for other in others:
        assert (other.codes != codes).mean() > 0.02


@each_order
def test_an_uncorrelated_hessian_leaves_rounding_to_nearest(desc_act: bool) -> None:
    w = weight_of(100)
    q = Optq(bits=3, group_size=48, desc_act=desc_act, grid="minmax", refine=0)(w, {"hessian": 4 * torch.eye(100)})
    assert_equal(q, oracles.rtn(w.numpy(), 3, 48, False, "minmax"), 48)


def test_equal_activities_keep_their_order() -> None:
    w, h = weight_of(96), hessian_of(96)
    d = h.diagonal().rsqrt()
    h = d[:, None] * h * d
    h.fill_diagonal_(1.0)
    ordered = Optq(bits=3, group_size=-1)(w, {"hessian": h})
    left_to_right = Optq(bits=3, group_size=-1, desc_act=False)(w, {"hessian": h})
    assert torch.equal(ordered.tensors["codes"], left_to_right.tensors["codes"])


@each_order
def test_dead_input_features_are_no_obstacle(desc_act: bool) -> None:
    w, h = weight_of(96), hessian_of(96)
    dead = torch.arange(96) % 7 == 3
    h[dead] = h[:, dead] = 0.0
    q = Optq(bits=4, group_size=32, desc_act=desc_act)(w, {"hessian": h})
    assert_equal(q, oracles.gptq(w.numpy(), h.numpy(), 4, 32, False, "mse", 0.01, desc_act), 32)


def test_a_group_wider_than_the_row_is_the_row() -> None:
    w, h = weight_of(40), hessian_of(40)
    for quantizer in (Rtn(group_size=64), Optq(group_size=64)):
        q = quantizer(w, {"hessian": h})
        assert q.tensors["scale"].shape == (3, 1)
        assert q.layout == type(quantizer)(group_size=-1)(w, {"hessian": h}).layout


@pytest.mark.parametrize(("columns", "group"), [*SHAPES, (1, 1), (129, 1), (128, 128), (1000, 129), (512, 384)])
def test_blocks_cover_the_columns_and_split_no_group_that_begins_inside(columns: int, group: int) -> None:
    group = columns if group == -1 else group
    spans = list(_spans(columns, group))
    assert [j for start, stop in spans for j in range(start, stop)] == list(range(columns))
    for start, stop in spans:
        begins = [j for j in range(start, stop) if j % group == 0]
        assert all(j == start or min(j + group, columns) <= stop for j in begins)


def test_a_hessian_of_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match="does not fit"):
        Optq()(weight_of(64), {"hessian": torch.eye(63)})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    h = torch.eye(64)
    h[3, 3] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        Optq()(weight_of(64), {"hessian": h})


@pytest.mark.parametrize("damp", [0.0, -0.1, 1.0, 5.0])
def test_damping_outside_its_range_is_refused(damp: float) -> None:
    with pytest.raises(RecipeError, match="damp_percent out of range"):
        Optq(damp_percent=damp)
