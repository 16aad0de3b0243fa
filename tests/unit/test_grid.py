"""Uniform grids, one row at a time against their definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import FITS, Levels, ends, spanning
from slimtune.quant.grid import SHRINKS, Grid, minmax_grid, mse_grid

each_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
each_sign = pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])

ROWS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(6, 45),
    "shifted": lambda: torch.randn(6, 45) + 3,
    "negative": lambda: -torch.rand(6, 45) - 0.1,
    "outliers": lambda: torch.randn(6, 45) * torch.where(torch.rand(6, 45) < 0.05, 30.0, 1.0),
    "tiny": lambda: 1e-20 * torch.randn(6, 45),
    "one column": lambda: torch.randn(6, 1),
    "constant": lambda: torch.tensor([[0.7], [-0.7], [0.0]]).expand(3, 45).contiguous(),
}
each_rows = pytest.mark.parametrize("rows", ROWS)


def levels_of(grid: Grid, row: int) -> Levels:
    return Levels(float(grid.scale[row]), int(grid.zero[row]), grid.bits)


@each_bits
@each_sign
@each_rows
@pytest.mark.parametrize("kind", ["minmax", "mse"])
def test_grid_is_the_one_of_the_definition(rows: str, bits: int, symmetric: bool, kind: str) -> None:
    w = ROWS[rows]().double()
    importance = torch.rand(w.shape[1], dtype=torch.float64) + 0.01
    grid = minmax_grid(w, bits, symmetric) if kind == "minmax" else mse_grid(w, bits, symmetric, importance)
    for r in range(len(w)):
        wanted = FITS[kind](w[r].numpy(), bits, symmetric, importance.numpy())
        assert levels_of(grid, r) == wanted
        assert np.array_equal(grid.codes(w)[r].numpy(), wanted.code(w[r].numpy()))
        assert np.array_equal(grid.nearest(w)[r].numpy(), wanted.value(wanted.code(w[r].numpy())))


@each_bits
@each_sign
@each_rows
def test_grids_can_be_stored(rows: str, bits: int, symmetric: bool) -> None:
    w = ROWS[rows]()
    for grid in (minmax_grid(w, bits, symmetric), mse_grid(w, bits, symmetric)):
        assert torch.equal(grid.scale, grid.scale.bfloat16().float()) and bool((grid.scale > 0).all())
        assert torch.equal(grid.zero, grid.zero.round())
        assert bool(((grid.zero >= 0) & (grid.zero < 2**bits)).all())
        codes = grid.codes(w)
        assert bool(((codes >= 0) & (codes < 2**bits) & (codes == codes.round())).all())
        assert bool(torch.isfinite(grid.nearest(w)).all())
        assert not bool(grid.nearest(torch.zeros_like(w)).any())  # zero is always a level


@each_bits
@each_sign
@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_shrink_has_less_error(bits: int, symmetric: bool, weighted: bool) -> None:
    w = ROWS["outliers"]().double()
    importance = torch.rand(w.shape[1], dtype=torch.float64) ** 4
    best = mse_grid(w, bits, symmetric, importance if weighted else None)
    counts = importance.numpy() if weighted else np.ones(w.shape[1])
    assert SHRINKS[0] == 1.0
    for r, row in enumerate(w.numpy()):

        def error(levels: Levels, row: np.ndarray = row) -> float:
            return float((counts * (levels.value(levels.code(row)) - row) ** 2).sum())

        low, high = ends(row, symmetric)
        others = [error(spanning(low * shrink, high * shrink, bits, symmetric)) for shrink in SHRINKS]
        assert error(levels_of(best, r)) <= min(others) * (1 + 1e-12) <= others[0] * (1 + 1e-12)


def test_shrinking_pays_where_there_are_outliers() -> None:
    w = torch.randn(4, 640)
    w[:, 5] = 8.0
    off = [float((grid.nearest(w) - w).square().sum()) for grid in (mse_grid(w, 3, False), minmax_grid(w, 3, False))]
    assert off[0] < 0.8 * off[1]


def test_importance_moves_the_grid_to_the_columns_that_matter() -> None:
    w = torch.randn(4, 640)
    w[:, 5] = 8.0
    only = torch.full((640,), 1e-6)
    only[5] = 1.0
    off = [(mse_grid(w, 3, False, counts).nearest(w)[:, 5] - 8).abs() for counts in (only, None)]
    assert bool((off[0] < 0.6 * off[1]).all())
