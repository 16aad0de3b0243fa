"""Round to nearest: every weight to the closest level of its group's grid. No data, no error feedback."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimtune.errors import RecipeError
from slimtune.linalg.packing import pack
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.grid import Grid, minmax_grid, mse_grid
from slimtune.quant.layouts import Affine

GridKind = Literal["mse", "minmax"]
AFFINE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Rtn:
    """Round to nearest on a uniform grid per group of input features.

    Example:
        >>> w = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
        >>> q = Rtn(bits=4, group_size=32)(w, {})
        >>> float((q.dequantize() - w).square().mean() / w.square().mean()) < 0.01
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    widths: ClassVar[tuple[int, ...]] = AFFINE_BITS

    bits: int = field(default=4, metadata={"help": "bits of a weight: 2 to 6, or 8"})
    group_size: int = field(default=64, metadata={"help": "input features that share a scale; -1: a whole row"})
    sym: bool = field(default=False, metadata={"help": "symmetric grid without zero points"})
    grid: GridKind = field(default="mse", metadata={"help": "mse searches each group's range; minmax takes all of it"})

    def __post_init__(self) -> None:
        check_affine(self.bits, self.group_size)

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`); `stats` is not used."""
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        size = group_width(self.group_size, w.shape[1])
        grids, codes = [], []
        for start in range(0, w.shape[1], size):
            part = w[:, start : start + size]
            grid = fit_grid(part, self.bits, self.sym, self.grid)
            grids.append(grid)
            codes.append(grid.codes(part))
        scale, zero = torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1)
        return affine_qtensor(torch.cat(codes, 1), scale, zero, self.bits, size, self.sym)


def check_affine(bits: int, group_size: int) -> None:
    """Raise `RecipeError` unless the affine layout has this width and group size."""
    if bits not in AFFINE_BITS:
        raise RecipeError("bits out of range", where="bits", got=bits, wanted=f"one of {AFFINE_BITS}")
    check_group(group_size)


def check_group(size: int, name: str = "group_size") -> None:
    """Raise `RecipeError` unless `size`, a field called `name`, is a group size or -1."""
    if size != -1 and size < 1:
        raise RecipeError(
            f"{name} out of range", where=name, got=size, wanted="a positive number, or -1 for whole rows"
        )


def group_width(group_size: int, in_features: int) -> int:
    """Columns of a group: -1, or anything wider than the row, means the whole row."""
    return in_features if group_size == -1 else min(group_size, in_features)


def fit_grid(w: Tensor, bits: int, symmetric: bool, kind: GridKind, weight: Tensor | None = None) -> Grid:
    """The grid of each row of `w` (`[rows, n]`), by the named rule."""
    if kind == "minmax":
        return minmax_grid(w, bits, symmetric)
    return mse_grid(w, bits, symmetric, weight)


def affine_qtensor(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, symmetric: bool, float_zero: bool = False
) -> QTensor:
    """Pack codes (`[out, in]`) and the scales and zero points of their groups (`[out, groups]`), all whole floats but
    the scales, and the zero points where `float_zero`."""
    rows, columns = codes.shape
    layout = Affine(rows, columns, bits, group_size, symmetric, float_zero)
    tensors = {"codes": pack(codes.to(torch.uint8), bits), "scale": scale.to(torch.bfloat16).contiguous()}
    if not symmetric:
        tensors["zero"] = zero.to(torch.bfloat16 if float_zero else torch.uint8).contiguous()
    return QTensor(tensors, layout)
