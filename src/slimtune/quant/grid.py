"""Uniform grids: where the `2**bits` levels of a group of weights lie.

`W ≈ (q - zero) * scale` with integer `q` and `zero` in `[0, 2**bits)`. Scales are rounded to bfloat16 here, once, so
that codes are fitted to the scale that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS = tuple(1.0 - 0.025 * i for i in range(28))
"""Fractions of the min-max range that the `mse` grid tries: 1 down to 0.325."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point per row: `scale` bfloat16-representable and positive, `zero` whole numbers; both `[rows,
    1]`."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, w: Tensor) -> Tensor:
        """Nearest codes of `w` (`[rows, n]`), as floats."""
        return (w / self.scale + self.zero).round_().clamp_(0, 2**self.bits - 1)

    def nearest(self, w: Tensor) -> Tensor:
        """Nearest representable values of `w` (`[rows, n]`)."""
        return (self.codes(w) - self.zero) * self.scale


def minmax_grid(w: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid from the least to the greatest weight of each row of `w` (`[rows, n]`), zero included.

    Symmetric grids span `±max|w|` around the code `2**(bits - 1)`.
    """
    return _spanning(*_range(w, symmetric), bits, symmetric)


def mse_grid(w: Tensor, bits: int, symmetric: bool, weight: Tensor | None = None) -> Grid:
    """The grid, among shrunken min-max grids, of least squared error on each row of `w` (`[rows, n]`).

    `weight` (`[n]`, optional) counts some columns more: the diagonal of the Hessian makes it the error of the outputs.
    """
    return shrunken_grid(w, bits, symmetric, mse_shrink(w, bits, symmetric, weight))


def mse_shrink(w: Tensor, bits: int, symmetric: bool, weight: Tensor | None = None) -> Tensor:
    """The fraction of its range, one of `SHRINKS`, that the `mse_grid` of each row of `w` spans: `[rows, 1]`."""
    low, high = _range(w, symmetric)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        grid = _spanning(low * shrink, high * shrink, bits, symmetric)
        off = (grid.nearest(w) - w).square_()
        error = off.sum(1, keepdim=True) if weight is None else (off @ weight).unsqueeze(1)
        best = torch.where(error < least, shrink, best)
        least = torch.minimum(error, least)
    return best


def shrunken_grid(w: Tensor, bits: int, symmetric: bool, shrink: Tensor) -> Grid:
    """The grid over a fraction (`[rows, 1]`) of the range of each row of `w` (`[rows, n]`), zero included."""
    low, high = _range(w, symmetric)
    return _spanning(low * shrink, high * shrink, bits, symmetric)


def _range(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        high = w.abs().amax(1, keepdim=True)
        return -high, high
    return w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)


def _spanning(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    levels = 2**bits - 1
    scale = ((high - low) / levels).to(torch.bfloat16).to(low.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # an all-zero row: any scale decodes it exactly
    if symmetric:
        return Grid(scale, torch.full_like(scale, float(2 ** (bits - 1))), bits)
    return Grid(scale, (-low / scale).round().clamp(0, levels), bits)
