"""Coordinate descent over codes and refitted scales, against loops that follow the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimtune.errors import RecipeError
from slimtune.linalg.packing import unpack
from slimtune.quant import refine
from slimtune.quant.optq import Optq
from slimtune.quant.refine import descend_, refit

SHAPES = [(37, 16), (100, 48), (200, 200), (300, 48)]
"""Columns and group size: odd, short last groups, one group, and more than one block of columns."""

each_shape = pytest.mark.parametrize(("columns", "size"), SHAPES)


def problem(columns: int, size: int, bits: int = 2, rows: int = 5) -> dict[str, Any]:
    x = torch.randn(2 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    groups = -(-columns // size)
    return {
        "codes": torch.randint(0, 2**bits, (columns, rows)).double(),
        "w": torch.randn(columns, rows, dtype=torch.float64),
        "h": x.T @ x / len(x),
        "scale": (0.3 + torch.rand(groups, rows)).to(torch.bfloat16).double(),
        "zero": torch.randint(0, 2**bits, (groups, rows)).double(),
        "size": size,
    }


def decoded(p: dict[str, Any]) -> Tensor:
    group = torch.arange(len(p["w"])) // p["size"]
    return (p["codes"] - p["zero"][group]) * p["scale"][group]


def loss(p: dict[str, Any]) -> Tensor:
    off = p["w"] - decoded(p)
    return (off * (p["h"] @ off)).sum(0)


@each_shape
def test_a_sweep_sets_every_code_to_the_best_of_all(columns: int, size: int) -> None:
    p = problem(columns, size, rows=3)
    codes, h = p["codes"].clone(), p["h"]
    for row in range(3):
        off = p["w"][:, row] - decoded(p)[:, row]
        for j in range(columns):
            s, z = p["scale"][j // size, row], p["zero"][j // size, row]
            losses = []
            for code in range(4):
                trial = off.clone()
                trial[j] = p["w"][j, row] - (code - z) * s
                losses.append(float(trial @ h @ trial))
            codes[j, row] = int(np.argmin(losses))
            off[j] = p["w"][j, row] - (codes[j, row] - z) * s
    before = p["codes"].clone()
    descend_(**p, levels=3)
    assert torch.equal(p["codes"], codes) and not torch.equal(codes, before)


@each_shape
def test_refitted_scales_are_the_least_squares_solution(columns: int, size: int) -> None:
    p = problem(columns, size)
    group = torch.arange(columns) // size
    p["w"] = (
        decoded(p) * (1 + 0.2 * torch.rand(len(p["scale"]), 5).double()[group]) + 0.01 * p["w"]
    )  # none turns around
    root = torch.linalg.cholesky(p["h"]).T
    wanted = torch.empty_like(p["scale"])
    for row in range(5):
        offset = p["codes"][:, row] - p["zero"][group, row]
        design = torch.zeros(columns, len(p["scale"]), dtype=torch.float64)
        design[torch.arange(columns), group] = offset
        wanted[:, row] = torch.linalg.lstsq(root @ design, (root @ p["w"][:, row])[:, None]).solution[:, 0]
    assert bool((wanted > 0.1 * p["scale"]).all())
    got = refit(**p)
    assert torch.equal(got, got.to(torch.bfloat16).double())
    torch.testing.assert_close(got, wanted, rtol=2**-8, atol=0)


def test_rows_in_chunks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(100, 48, rows=7)
    whole = refit(**p)
    monkeypatch.setattr(refine, "ENTRIES", 3 * 3 * 48)
    assert torch.equal(refit(**p), whole)


def test_scales_that_would_turn_around_stay() -> None:
    p = problem(64, 16)
    p["w"] = -decoded(p)
    assert torch.equal(refit(**p), p["scale"])
    p["codes"] = p["zero"][torch.arange(64) // 16].clone()  # decodes to nothing, whatever the scale
    assert torch.equal(refit(**p), p["scale"])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
def test_rounds_lower_the_loss_of_optq(bits: int, sym: bool, desc_act: bool) -> None:
    p = problem(100, 48)
    w, h = p["w"].T.contiguous(), p["h"]
    losses = []
    for rounds in (0, 1, 2, 4):
        q = Optq(bits=bits, group_size=48, sym=sym, desc_act=desc_act, refine=rounds)(w, {"hessian": h})
        off = q.dequantize(torch.float64) - w
        losses.append(float(((off @ h) * off).sum()))
    assert losses[0] > losses[1] >= losses[2] >= losses[3]
    assert losses[3] < 0.95 * losses[0]


def test_a_round_is_refit_then_descend_on_the_damped_hessian() -> None:
    p = problem(100, 48, bits=3)
    w, h = p["w"].T.contiguous(), p["h"]
    plain = Optq(bits=3, group_size=48, damp_percent=0.1, refine=0)(w, {"hessian": h})
    codes = unpack(plain.tensors["codes"], 3, 100).double().T.contiguous()
    scale, zero = (plain.tensors[name].double().T.contiguous() for name in ("scale", "zero"))
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(100)
    scale = refit(codes, p["w"], damped, scale, zero, 48)
    descend_(codes, p["w"], damped, scale, zero, 48, 7)
    refined = Optq(bits=3, group_size=48, damp_percent=0.1, refine=1)(w, {"hessian": h})
    assert torch.equal(unpack(refined.tensors["codes"], 3, 100).T, codes.to(torch.uint8))
    assert torch.equal(refined.tensors["scale"].double().T, scale)
    assert torch.equal(refined.tensors["zero"], plain.tensors["zero"])


def test_default_rounds_depend_on_the_width() -> None:
    assert [Optq(bits=bits).rounds for bits in (2, 3, 4, 8)] == [4, 2, 0, 0]
    assert Optq(bits=4, refine=3).rounds == 3 and Optq(bits=2, refine=0).rounds == 0
    with pytest.raises(RecipeError, match="refine out of range"):
        Optq(refine=-1)
