"""Half-quadratic quantization: zero points that make large errors few, found without data (HQQ, Badri and Shaji 2023).

For a group `w` and its codes `q` on the grid `(q - z)·s` the zero point `z` minimises `Σ|w - (q - z)·s|^p`, p < 1,
which forgives outliers. With an auxiliary error `e`, pulled to the residual by `β`, both steps are closed forms: `e` is
the shrunken residual, and `z` the mean of `q - (w - e)/s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.quant.base import QTensor, Stats
from slimtune.quant.grid import Grid, minmax_grid
from slimtune.quant.rtn import AFFINE_BITS, affine_qtensor, check_affine, group_width

P, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20
"""The norm, the pull on the auxiliary error, its growth and the rounds: the paper's, for every width."""


@dataclass(frozen=True)
class Hqq:
    """Round to nearest between least and greatest weight, with zero points fitted by half-quadratic splitting.

    Scales are not fitted. Zero points are no whole numbers, so compressed-tensors cannot hold the result.

    Example:
        >>> w = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
        >>> q = Hqq(bits=4, group_size=32)(w, {})
        >>> float((q.dequantize() - w).square().mean() / w.square().mean()) < 0.01
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    widths: ClassVar[tuple[int, ...]] = AFFINE_BITS

    bits: int = field(default=4, metadata={"help": "bits of a weight: 2, 3, 4 or 8"})
    group_size: int = field(default=64, metadata={"help": "input features that share a scale; -1: a whole row"})

    def __post_init__(self) -> None:
        check_affine(self.bits, self.group_size)

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`); `stats` is not used."""
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        rows, columns = w.shape
        size = group_width(self.group_size, columns)
        whole = columns - columns % size
        parts = [w[:, :whole].reshape(-1, size), w[:, whole:]] if whole < columns else [w.reshape(-1, size)]
        grids = [fit_zero(part, self.bits) for part in parts]
        pairs = list(zip(parts, grids, strict=True))
        codes = torch.cat([grid.codes(part).view(rows, -1) for part, grid in pairs], 1)
        scale = torch.cat([grid.scale.view(rows, -1) for grid in grids], 1)
        zero = torch.cat([grid.zero.view(rows, -1) for grid in grids], 1)
        return affine_qtensor(codes, scale, zero, self.bits, size, symmetric=False, float_zero=True)


def fit_zero(w: Tensor, bits: int) -> Grid:
    """The grid of each row of `w` (`[groups, n]`): min-max scales, fitted zero points, bfloat16-representable both.

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
    fitted = Grid(scale, zero.to(torch.bfloat16).to(w.dtype), bits)
    found, least = ((grid.nearest(w) - w).square().sum(1, keepdim=True) for grid in (fitted, plain))
    return Grid(scale, torch.where(found <= least, fitted.zero, plain.zero), bits)
