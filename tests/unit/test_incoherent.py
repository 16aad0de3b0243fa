"""Rotated bases and rounding by blocks, against the textbook's loops; what `quip` and `trellis` store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtune.errors import CalibrationError, RecipeError, ShapeError
from slimtune.linalg.hadamard import matrix
from slimtune.linalg.hessian import inverse_cholesky
from slimtune.linalg.lattice import decode
from slimtune.quant import QTensor
from slimtune.quant.incoherent import descend_, round_blocks, turn
from slimtune.quant.quip import Points, Quip
from slimtune.quant.trellis import Trellis, Walks

METHODS = [Quip(2), Quip(3), Quip(4), Trellis(2), Trellis(4)]
SHAPES = [(5, 37), (12, 8), (37, 100), (1, 3), (32, 48)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__.lower()}-{m.bits}")


@dataclass(frozen=True)
class Levels:
    """A code that is plain to see: pairs of rows, every number to the nearest half."""

    columns: int
    rows: int = 2

    def encode(self, x: Tensor) -> Tensor:
        return (x * 2).round().add(128).clamp(0, 255).to(torch.uint8).reshape(-1, self.rows * self.columns)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return ((codes.to(dtype) - 128) / 2).view(-1, self.columns)


def hessian_of(columns: int) -> Tensor:
    x = torch.randn(2 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    return x.T @ x / len(x)


def loss(off: Tensor, h: Tensor) -> Tensor:
    return ((off @ h) * off).sum(1)


def ldlq(w: Tensor, h: Tensor, block: int) -> Tensor:
    """Block LDLQ as it is written, `H = L D Lᵀ` with identity blocks on the diagonal of `L`, from the last block to the
    first."""
    n = len(h)
    c = torch.linalg.cholesky(h)
    inverse = torch.zeros_like(c)
    for k in range(0, n, block):
        inverse[k : k + block, k : k + block] = torch.linalg.inv(c[k : k + block, k : k + block])
    lower, done = c @ inverse, torch.zeros_like(w)
    for k in range(n - block, -1, -block):
        here, after = slice(k, k + block), slice(k + block, n)
        target = w[:, here] + (w[:, after] - done[:, after]) @ lower[after, here]
        done[:, here] = (target * 2).round() / 2
    return done


@pytest.mark.parametrize(("columns", "block"), [(8, 8), (136, 8), (304, 8), (48, 16), (272, 16), (150, 1)])
def test_rounding_by_blocks_is_the_textbook_with_columns_reversed(columns: int, block: int) -> None:
    w, h = 2 * torch.randn(6, columns, dtype=torch.float64), hessian_of(columns)
    before = w.clone()
    upper, damp = inverse_cholesky(h)
    codes, values = round_blocks(w, upper, Levels(block))
    h.diagonal().add_(damp * h.diagonal().mean())
    torch.testing.assert_close(values, ldlq(w.flip(1), h.flip(0, 1), block).flip(1))
    assert torch.equal(torch.cat([Levels(block).decode(c, w.dtype) for c in codes], 1), values)
    assert torch.equal(w, before)


def test_error_feedback_lowers_the_loss() -> None:
    w, h = 2 * torch.randn(6, 96, dtype=torch.float64), hessian_of(96)
    _, values = round_blocks(w, inverse_cholesky(h)[0], Levels(8))
    assert float(loss(values - w, h).sum()) < 0.7 * float(loss((w * 2).round() / 2 - w, h).sum())


@pytest.mark.parametrize("columns", [16, 144, 272])
def test_a_sweep_is_the_textbook_and_never_raises_the_loss(columns: int) -> None:
    w, h = torch.randn(8, columns, dtype=torch.float64), hessian_of(columns)
    code = Levels(8)
    turned = turn(w, h, code, spread=2.0, damp=0.01, seed=3)
    codes, values = round_blocks(turned.w, turned.upper, code)
    want = values.clone()
    for k in range(0, columns, 8):
        here = slice(k, k + 8)
        target = want[:, here] + ((turned.w - want) @ turned.h)[:, here] @ torch.linalg.inv(turned.h[here, here])
        tried = want.clone()
        tried[:, here] = (target * 2).round() / 2
        better = (loss(tried - turned.w, turned.h) < loss(want - turned.w, turned.h)).view(-1, 2)
        pairs = [loss(x - turned.w, turned.h).view(-1, 2).sum(1) for x in (tried, want)]
        better = (pairs[0] < pairs[1]).repeat_interleave(2)
        want[better] = tried[better]
    before = float(loss(values - turned.w, turned.h).sum())
    descend_(codes, values, turned, code)
    torch.testing.assert_close(values, want)
    assert torch.equal(torch.cat([code.decode(c, w.dtype) for c in codes], 1), values)
    assert float(loss(values - turned.w, turned.h).sum()) < before


@each_shape
@pytest.mark.parametrize("code", [Points(2), Walks(2)], ids=["lattice", "trellis"])
def test_the_rotated_problem_is_the_same_problem(shape: tuple[int, int], code: Any) -> None:
    w, h = torch.randn(shape, dtype=torch.float64), hessian_of(shape[1])
    turned = turn(w, h, code, spread=0.9, damp=0.01, seed=0)
    rows, columns = turned.w.shape
    assert rows % code.rows == 0 and columns % code.columns == 0
    assert bool((turned.sign_in.abs() == 1).all())
    back = (matrix(rows).T @ turned.w @ matrix(columns))[: shape[0], : shape[1]]
    torch.testing.assert_close(back * turned.sign_out.double()[:, None] * turned.sign_in.double(), w)
    torch.testing.assert_close(back.square().mean(1).sqrt(), torch.full((shape[0],), 0.9).double(), rtol=0.01, atol=0)
    flat = matrix(columns)[:, : shape[1]] * turned.sign_in.double()
    damping = turned.h - flat @ h @ flat.T
    torch.testing.assert_close(damping, damping[0, 0] * torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(damping[0, 0]) == pytest.approx(0.01 * float((flat @ h @ flat.T).diagonal().mean()))
    torch.testing.assert_close(turned.upper @ turned.h @ turned.upper.T, torch.eye(columns, dtype=torch.float64))


@each_shape
@each_method
def test_dequantize_is_the_formula(shape: tuple[int, int], method: Any) -> None:
    q = method(torch.randn(shape), {"hessian": hessian_of(shape[1])})
    codes, bits = q.tensors["codes"], method.bits
    if isinstance(method, Quip):
        c = decode(codes.view(shape[0], -1, bits), torch.float64).flatten(1)
    else:
        code, blocks = Walks(bits), codes.view(len(codes), -1, 32 * bits).unbind(1)
        c = torch.cat([code.decode(block, torch.float64) for block in blocks], 1)
    turned = (matrix(len(c)).T @ c @ matrix(c.shape[1]))[: shape[0], : shape[1]]
    wanted = q.tensors["sign_out"].double()[:, None] * turned * q.tensors["sign_in"].double()
    torch.testing.assert_close(q.dequantize(torch.float64), wanted)


@each_method
def test_codes_take_their_bits_exactly(method: Any) -> None:
    q = method(torch.randn(32, 64), {"hessian": hessian_of(64)})
    assert 8 * q.tensors["codes"].numel() == method.bits * 32 * 64
    assert q.bits_per_weight == method.bits + 16 / 32 + 16 / 64


@each_method
def test_rows_of_any_size_keep_their_share(method: Any) -> None:
    """A basis that mixes rows must not lose the small ones among the great ones."""
    w = torch.randn(32, 64, dtype=torch.float64)
    w[:8] *= 1e-20
    w[8:12] = 0
    w[12] *= 1e6
    off = method(w, {"hessian": torch.eye(64)}).dequantize(torch.float64) - w
    assert not bool(off[8:12].any())
    share = off.square().sum(1) / w.square().sum(1).clamp(min=1e-300)
    assert float(share[w.any(1)].max()) < {2: 0.3, 3: 0.1, 4: 0.03}[method.bits]


@each_method
def test_autocast_does_not_touch_the_weight(method: Any) -> None:
    q = method(torch.randn(32, 64), {"hessian": hessian_of(64)})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q.dequantize(), q.dequantize())
        inside = q.dequantize()
    assert torch.equal(inside, q.dequantize())


def test_trellis_is_better_than_lattice_and_sweeps_than_none() -> None:
    w, h = torch.randn(48, 96), hessian_of(96)

    def total(q: QTensor) -> float:
        return float(loss(q.dequantize(torch.float64) - w.double(), h).sum())

    for bits in (2, 3, 4):
        once = total(Quip(bits)(w, {"hessian": h}))
        assert total(Quip(bits, sweeps=2)(w, {"hessian": h})) < once
        assert total(Trellis(bits)(w, {"hessian": h})) < once


@pytest.mark.parametrize("make", [Quip, Trellis])
def test_fields_and_statistics_are_checked(make: Any) -> None:
    w, h = torch.randn(16, 16), hessian_of(16)
    assert not torch.equal(make(seed=1)(w, {"hessian": h}).dequantize(), make(seed=2)(w, {"hessian": h}).dequantize())
    with pytest.raises(ShapeError, match="does not fit"):
        make()(w, {"hessian": h[:8, :8]})
    assert make().seed == -1  # the recipe's; where there is none, 0
    unsaid, zero = (made(w, {"hessian": h}).tensors for made in (make(), make(seed=0)))
    assert all(torch.equal(unsaid[name], zero[name]) for name in zero)
    for wrong in ({"damp_percent": 0.0}, {"sweeps": -1}, {"bits": 8}, {"seed": -2}, {"seed": 2**32}):
        with pytest.raises(RecipeError, match="out of range"):
            make(**wrong)
    with pytest.raises(CalibrationError, match="not positive definite"):
        make()(w, {"hessian": -h})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_turned_in_float32_unless_they_have_more(dtype: torch.dtype) -> None:
    turned = turn(torch.randn(20, 36).to(dtype), torch.eye(36), Points(2), spread=0.9, damp=0.01, seed=0)
    wanted = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in (turned.w, turned.h, turned.upper)} == {wanted}
