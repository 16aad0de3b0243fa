"""Incoherence, and rounding by blocks with error feedback: what lattice and trellis codes share.

Source: QuIP# (arXiv 2402.04396), sections 3 and 4. Random signs and a Hadamard-type transform on both sides make the
entries of a weight nearly normal and independent; the Hessian is turned alike. Blocks of columns are then rounded one
after another, and the columns still to come make up for the error ("block LDLQ"). With `U` the upper factor of the
damped `H⁻¹` that OPTQ uses, too, the error of block `k` that is fed forward is `(w_k - q_k) U_kk⁻¹ U_k`; a paper that
goes from the last block to the first has the same result for columns in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.errors import RecipeError, ShapeError
from slimtune.linalg.hadamard import transform
from slimtune.linalg.hessian import aligned, inverse_cholesky
from slimtune.quant.base import QTensor, Stats, check_share
from slimtune.quant.layouts import Layout

BITS = (2, 3, 4)

SPAN = 128
"""Columns whose corrections are gathered before the rest of the weight is touched (a speed choice, not a result)."""


class Code(Protocol):
    """A code for tiles of `rows` by `columns` normal numbers of variance 1."""

    @property
    def rows(self) -> int:
        """Rows of a tile."""

    @property
    def columns(self) -> int:
        """Columns of a tile."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes, uint8 `[m, bytes]`, of a column of `m` tiles (`[m * rows, columns]`)."""

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers that codes stand for, `dtype [m * rows, columns]`."""


@dataclass(frozen=True)
class Turned:
    """A weight and its damped Hessian in the rotated basis, padded, with what turns the weight back.

    `w` (`[rows, columns]`) has entries of root mean square `spread`, `h` and `upper` (`UᵀU = H⁻¹`) are `[columns,
    columns]`; `sign_out`, `sign_in` are as a layout stores them.
    """

    w: Tensor
    h: Tensor
    upper: Tensor
    sign_out: Tensor
    sign_in: Tensor


def check(bits: int, damp_percent: float, sweeps: int) -> None:
    """Raise `RecipeError` where a field is out of range."""
    if bits not in BITS:
        raise RecipeError("bits out of range", where="bits", got=bits, wanted=f"one of {BITS}")
    if not 0 < damp_percent < 1:
        raise RecipeError("damp_percent out of range", got=damp_percent, wanted="between 0 and 1")
    if sweeps < 0:
        raise RecipeError("sweeps out of range", got=sweeps, wanted="a number of rounds")


@dataclass(frozen=True)
class Incoherent:
    """A quantizer of this kind; a subclass has a `code` for its bits, the `layout` of what it makes, and a `spread`."""

    widths: ClassVar[tuple[int, ...]] = BITS
    spread: ClassVar[float]
    code: ClassVar[Callable[[int], Code]]
    layout: ClassVar[Callable[[int, int, int], Layout]]

    bits: int = field(default=2, metadata={"help": "bits of a weight: 2, 3 or 4"})
    damp_percent: float = field(default=0.01, metadata={"help": "dampening, a fraction of the Hessian's mean diagonal"})
    sweeps: int = field(default=0, metadata={"help": "rounds in which every block is rounded again, given the others"})
    seed: int = field(default=-1, metadata={"help": "of the random signs; -1: the recipe's, or 0 where there is none"})
    gptaq: float = field(
        default=0.0, metadata={"help": "share of the drift of the inputs to make up for (GPTAQ: 0.25); a pass more"}
    )

    def __post_init__(self) -> None:
        check(self.bits, self.damp_percent, self.sweeps)
        check_share(self.gptaq)
        if not -1 <= self.seed < 2**32:
            raise RecipeError("seed out of range", where="seed", got=self.seed, wanted="-1 to 4294967295")

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian of the inputs, and their drift from the dense model's where weights make up for it."""
        return frozenset({"hessian", "drift"} if self.gptaq else {"hessian"})

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`) given `stats["hessian"]` (`[in, in]`). Float64 weights stay float64."""
        if self.gptaq:
            weight = aligned(weight, stats["hessian"], stats["drift"], self.gptaq)
        code, seed = type(self).code(self.bits), max(self.seed, 0)
        tensors = quantize(
            weight, stats, code, spread=self.spread, damp=self.damp_percent, seed=seed, sweeps=self.sweeps
        )
        rows, columns = weight.shape
        return QTensor(tensors, type(self).layout(rows, columns, self.bits))


def quantize(
    weight: Tensor, stats: Stats, code: Code, *, spread: float, damp: float, seed: int, sweeps: int
) -> dict[str, Tensor]:
    """The stored tensors of a weight (float `[out, in]`) given `stats["hessian"]` (`[in, in]`).

    Args:
        weight: float64 stays float64; all others are computed in float32.
        stats: with the Hessian.
        code: for the tiles.
        spread: standard deviation at which the code meets the weights, in units of the one that it is made for.
            Less than 1 leaves room for the errors that are fed back.
        damp: the first dampening, a fraction of the Hessian's mean diagonal.
        seed: of the signs.
        sweeps: rounds of coordinate descent after the rounding.
    """
    turned = turn(weight, stats["hessian"], code, spread=spread, damp=damp, seed=seed)
    codes, values = round_blocks(turned.w, turned.upper, code)
    for _ in range(sweeps):
        descend_(codes, values, turned, code)
    signs = {"sign_out": turned.sign_out, "sign_in": turned.sign_in}
    return {"codes": codes.transpose(0, 1).flatten(1).contiguous(), **signs}


def turn(weight: Tensor, hessian: Tensor, code: Code, *, spread: float, damp: float, seed: int) -> Turned:
    """The rotated problem. Every row is divided by its root mean square first, so none is lost among greater ones."""
    rows, columns = weight.shape
    if tuple(hessian.shape) != (columns, columns):
        raise ShapeError("the Hessian does not fit the weight", got=list(hessian.shape), wanted=[columns, columns])
    generator = torch.Generator().manual_seed(seed)
    sign_in, sign_out = (_signs(size, generator).to(weight.device) for size in (columns, rows))
    size = weight.to(torch.float64).square().mean(1).sqrt() / spread
    sign_out = (sign_out * size).to(torch.bfloat16)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = torch.where(sign_out == 0, 1, sign_out).to(w.dtype)  # a row of zeros: the scale 0 and any codes
    down, across = -rows % code.rows, -columns % code.columns
    w = transform(transform(pad(w / scale[:, None] * sign_in.to(w.dtype), (0, across, 0, down))), 0)
    h = pad(hessian.to(torch.float64) * sign_in * sign_in[:, None], (0, across, 0, across))
    h = transform(transform(h), 0)
    upper, damping = inverse_cholesky(h, damp)
    h.diagonal().add_(damping * h.diagonal().mean())
    return Turned(w, h.to(w.dtype), upper.to(w.dtype), sign_out, sign_in.to(torch.bfloat16))


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).double().mul_(2).sub_(1)


def round_blocks(w: Tensor, upper: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Codes `[blocks, m, bytes]` of `w` (`[rows, columns]`), block by block with error feedback, and what they stand
    for (`[rows, columns]`). `upper` is the factor of `inverse_cholesky`."""
    w = w.clone()
    codes = []
    for start in range(0, w.shape[1], SPAN):
        inside, corner = w[:, start : start + SPAN], upper[start : start + SPAN, start : start + SPAN]
        errors = torch.empty_like(inside)
        for k in range(0, inside.shape[1], code.columns):
            here, after = slice(k, k + code.columns), slice(k + code.columns, None)
            codes.append(code.encode(inside[:, here]))
            values = code.decode(codes[-1], w.dtype)
            off = inside[:, here] - values
            errors[:, here] = torch.linalg.solve_triangular(corner[here, here], off, upper=True, left=False)
            inside[:, after].addmm_(errors[:, here], corner[here, after], alpha=-1)
            inside[:, here] = values  # no later block looks at it again
        w[:, start + SPAN :].addmm_(errors, upper[start : start + SPAN, start + SPAN :], alpha=-1)
    return torch.stack(codes), w


def descend_(codes: Tensor, values: Tensor, turned: Turned, code: Code) -> None:
    """Round every block again to what is best given all others, and keep what lowers the loss: one sweep, in place.

    Without a code the best block is `values_k + (E H)_k H_kk⁻¹` with `E` the error. The loss is `tr(E H Eᵀ)`; it never
    rises. `codes` and `values` as from `round_blocks`.
    """
    h, columns = turned.h, values.shape[1]
    gradient = (turned.w - values) @ h
    for start in range(0, columns, SPAN):
        stop = min(start + SPAN, columns)
        steps = values.new_zeros(len(values), stop - start)
        for k in range(start, stop, code.columns):
            here, local, after = slice(k, k + code.columns), slice(k - start, k - start + code.columns), slice(k, stop)
            now, slope, corner = values[:, here], gradient[:, here], h[here, here]
            tried = code.encode(now + torch.linalg.solve(corner, slope, left=False))
            step = code.decode(tried, values.dtype) - now
            gain = (step * (2 * slope - step @ corner)).sum(1).view(-1, code.rows).sum(1)
            better = gain > 0
            step *= better.repeat_interleave(code.rows)[:, None]
            codes[k // code.columns][better] = tried[better]
            values[:, here] += step
            steps[:, local] = step
            gradient[:, after].addmm_(step, h[here, after], alpha=-1)
        gradient[:, stop:].addmm_(steps, h[start:stop, stop:], alpha=-1)
