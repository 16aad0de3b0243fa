"""Uniform grids with zero points between the levels, fitted to the weights alone (HQQ, Badri and Shaji 2023).

For a group `w` and its codes `q` on the grid `(q - z)·s` HQQ's zero point `z` minimises `Σ|w - (q - z)·s|^p`, p < 1,
which forgives outliers. With an auxiliary error `e`, pulled to the residual by `β`, both steps are closed forms: `e` is
the shrunken residual, and `z` the mean of `q - (w - e)/s`. Weights of trained models are too small for `e` to be
anything but 0, so what remains is least squares in `z`; the same in `s`, too, costs as little and does much better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimtune.quant.base import QTensor, Stats
from slimtune.quant.grid import Grid, minmax_grid
from slimtune.quant.rtn import AFFINE_BITS, affine_qtensor, check_affine, group_width

P, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20
"""The norm, the pull on the auxiliary error, its growth and the rounds: the paper's, for every width."""

RANGES, FITS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65), 5
"""Fractions of a group's range that fitted grids start from, and how often each is fitted (28 starts gain 2 % more)."""


@dataclass(frozen=True)
class Hqq:
    """Round to nearest on grids whose zero points are no whole numbers, and are fitted to each group.

    Scales span the group and stay (HQQ as published), or are fitted as well. compressed-tensors cannot hold the result:
    its zero points are whole.

    Example:
        >>> w = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
        >>> loss = lambda **fields: float((Hqq(bits=2, **fields)(w, {}).dequantize() - w).square().mean())
        >>> loss(scale="fitted") < 0.7 * loss(scale="minmax")
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    widths: ClassVar[tuple[int, ...]] = AFFINE_BITS

    bits: int = field(default=4, metadata={"help": "bits of a weight: 2 to 6, or 8"})
    group_size: int = field(default=64, metadata={"help": "input features that share a scale; -1: a whole row"})
    scale: Literal["fitted", "minmax"] = field(
        default="fitted", metadata={"help": "fitted by least squares; minmax spans the group, as HQQ does"}
    )

    def __post_init__(self) -> None:
        check_affine(self.bits, self.group_size)

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`); `stats` is not used."""
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        rows, columns = w.shape
        size = group_width(self.group_size, columns)
        whole = columns - columns % size
        parts = [w[:, :whole].reshape(-1, size), w[:, whole:]] if whole < columns else [w.reshape(-1, size)]
        grids = [(fit_both if self.scale == "fitted" else fit_zero)(part, self.bits) for part in parts]
        pairs = list(zip(parts, grids, strict=True))
        codes = torch.cat([grid.codes(part).view(rows, -1) for part, grid in pairs], 1)
        scale = torch.cat([grid.scale.view(rows, -1) for grid in grids], 1)
        zero = torch.cat([grid.zero.view(rows, -1) for grid in grids], 1)
        return affine_qtensor(codes, scale, zero, self.bits, size, symmetric=False, float_zero=True)


def fit_zero(w: Tensor, bits: int) -> Grid:
    """The grid of each row of `w` (`[groups, n]`): min-max scales, half-quadratic zero points, bfloat16 both.

    The whole zero point of the min-max grid stays where the fitted one, as stored, has a greater squared error.
    """
    plain = minmax_grid(w, bits, symmetric=False)
    scale = plain.scale
    zero = -w.amin(1, keepdim=True).clamp(max=0) / scale
    for k in range(ROUNDS):
        codes = Grid(scale, zero, bits).codes(w)
        off = w - (codes - zero) * scale
        size = off.abs()
        # Where nothing is off the power is infinite, and the difference is cut to 0.
        shrunk = off.sign() * (size - size.pow(P - 1) / (BETA * KAPPA**k)).clamp(min=0)
        zero = (codes - (w - shrunk) / scale).mean(1, keepdim=True)
    return _better(Grid(scale, _rounded(zero), bits), plain, w)


def fit_both(w: Tensor, bits: int) -> Grid:
    """The grid of each row of `w` (`[groups, n]`) of least squared error: scales and zero points, bfloat16 both.

    Codes and grid are fitted to one another in turn (Lloyd 1982), from several ranges; the best grid as stored stays,
    the min-max grid among them.
    """
    best = minmax_grid(w, bits, symmetric=False)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    mean = w.mean(1, keepdim=True)
    for part in RANGES:
        # In a constant group all of this is not a number, and the min-max grid stays.
        scale = (high - low) * part / (2**bits - 1)
        zero = ((high - low) * part - (high + low)) / 2 / scale
        for fit in range(FITS + 1):
            stored = _rounded(scale)
            codes = Grid(stored, zero * scale / stored, bits).codes(w)
            best = _better(Grid(stored, _rounded((codes - w / stored).mean(1, keepdim=True)), bits), best, w)
            if fit < FITS:
                codes = Grid(scale, zero, bits).codes(w)
                centre = codes.mean(1, keepdim=True)
                spread = codes - centre
                scale = (spread * w).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True)
                zero = centre - mean / scale
    return best


def _better(new: Grid, old: Grid, w: Tensor) -> Grid:
    """Of two grids the one with the less squared error, row by row; the old one where they are equal."""
    found, least = ((grid.nearest(w) - w).square().sum(1, keepdim=True) for grid in (new, old))
    better = (found < least) & (new.scale > 0)
    return Grid(torch.where(better, new.scale, old.scale), torch.where(better, new.zero, old.zero), new.bits)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)
