"""OPTQ, better known as GPTQ: round one column at a time and let the columns still to come make up for the error.

Source: arXiv 2210.17323. With `U` the upper Cholesky factor of the damped `H⁻¹`, column `j` is rounded to `q`, and
`(w_j - q) / U_jj` times the rest of row `j` of `U` is subtracted from the columns to its right. Two choices:

* `desc_act`: columns go in the order of falling `diag H`, on grids fixed beforehand from the original weights ("static
  groups"), so the stored groups stay contiguous and no index is needed to run the model.
* otherwise columns go left to right and each group's grid is fitted when its turn comes, to the corrected weights.

At 2 and 3 bits rounds of `slimtune.quant.refine` follow: scales refitted to the codes, then codes to the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.errors import RecipeError, ShapeError
from slimtune.linalg.hessian import aligned, inverse_cholesky
from slimtune.quant.base import QTensor, Stats, check_share
from slimtune.quant.refine import descend_, refit
from slimtune.quant.rtn import AFFINE_BITS, GridKind, affine_qtensor, check_affine, fit_grid, group_width

BLOCK = 128
"""Columns whose corrections are gathered before the rest of the weight is touched (a speed choice, not a result)."""


@dataclass(frozen=True)
class Optq:
    """GPTQ in its Cholesky form, with lazy blocks, searched grids and act-order on static groups.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> w, x = torch.randn(8, 96, generator=g), torch.randn(500, 96, generator=g) @ torch.randn(96, 96, generator=g)
        >>> h = x.T @ x / 500
        >>> loss = lambda q: float(((q.dequantize() - w) @ h * (q.dequantize() - w)).sum())
        >>> from slimtune.quant.rtn import Rtn
        >>> loss(Optq(bits=3, group_size=32)(w, {"hessian": h})) < 0.6 * loss(Rtn(bits=3, group_size=32)(w, {}))
        True
    """

    widths: ClassVar[tuple[int, ...]] = AFFINE_BITS

    bits: int = field(default=4, metadata={"help": "bits of a weight: 2 to 6, or 8"})
    group_size: int = field(default=64, metadata={"help": "input features that share a scale; -1: a whole row"})
    sym: bool = field(default=False, metadata={"help": "symmetric grid without zero points"})
    grid: GridKind = field(default="mse", metadata={"help": "mse searches each group's range; minmax takes all of it"})
    desc_act: bool = field(default=True, metadata={"help": "most active input features first (static groups)"})
    damp_percent: float = field(default=0.01, metadata={"help": "dampening, a fraction of the Hessian's mean diagonal"})
    refine: int | None = field(
        default=None, metadata={"help": "rounds of refitting; default: 4 at 2 bits, 2 at 3 bits, none above"}
    )
    gptaq: float = field(
        default=0.0, metadata={"help": "share of the drift of the inputs to make up for (GPTAQ: 0.25); a pass more"}
    )

    def __post_init__(self) -> None:
        check_affine(self.bits, self.group_size)
        if not 0 < self.damp_percent < 1:
            raise RecipeError("damp_percent out of range", got=self.damp_percent, wanted="between 0 and 1")
        check_share(self.gptaq)
        if self.refine is not None and self.refine < 0:
            raise RecipeError("refine out of range", got=self.refine, wanted="a number of rounds, or nothing")

    @property
    def rounds(self) -> int:
        """Rounds of refinement."""
        return {2: 4, 3: 2}.get(self.bits, 0) if self.refine is None else self.refine

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian of the inputs, and their drift from the dense model's where weights make up for it."""
        return frozenset({"hessian", "drift"} if self.gptaq else {"hessian"})

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`) given `stats["hessian"]` (`[in, in]`). Float64 weights stay float64."""
        h = stats["hessian"]
        columns, rows = weight.shape[1], weight.shape[0]
        if tuple(h.shape) != (columns, columns):
            raise ShapeError("the Hessian does not fit the weight", got=list(h.shape), wanted=[columns, columns])
        if self.gptaq:
            weight = aligned(weight, h, stats["drift"], self.gptaq)
        size = group_width(self.group_size, columns)
        # Transposed, so that a column of the weight is one contiguous row.
        original = weight.T.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if self.desc_act else None
        upper, damping = inverse_cholesky(h if order is None else h[order.unsqueeze(1), order], self.damp_percent)
        upper = upper.to(original.dtype)
        importance = h.diagonal().to(original.dtype)
        scale, zero = original.new_empty(2, -(-columns // size), rows)

        def fit(w: Tensor, start: int) -> None:
            grid = fit_grid(w.T, self.bits, self.sym, self.grid, importance[start : start + size])
            scale[start // size], zero[start // size] = grid.scale.squeeze(1), grid.zero.squeeze(1)

        if order is not None:
            for start in range(0, columns, size):
                fit(original[start : start + size], start)
        w = original.clone() if order is None else original[order]
        codes = torch.empty_like(w)
        for start, stop in _spans(columns, columns if order is not None else size):
            inside, corner = w[start:stop], upper[start:stop, start:stop]
            errors = torch.empty_like(inside)
            groups = (torch.arange(start, stop) if order is None else order[start:stop]).div(
                size, rounding_mode="floor"
            )
            for k, (group, pivot) in enumerate(zip(groups.tolist(), corner.diagonal().tolist(), strict=True)):
                if order is None and (start + k) % size == 0:
                    fit(w[start + k : start + k + size], start + k)
                _round_column_(inside, corner, errors, codes[start + k], k, pivot, scale[group], zero[group], self.bits)
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        del upper, w
        if order is not None:
            codes = torch.empty_like(codes).index_copy_(0, order, codes)
        if self.rounds:
            h = h.to(original.dtype, copy=True)
            h.diagonal().add_(damping * h.diagonal().mean())
            for _ in range(self.rounds):
                scale = refit(codes, original, h, scale, zero, size)
                descend_(codes, original, h, scale, zero, size, 2**self.bits - 1)
        return affine_qtensor(codes.T, scale.T, zero.T, self.bits, size, self.sym)


Nearest = Callable[[Tensor, int], "tuple[Tensor, Tensor]"]
"""Codes of a column `[out]`, whole floats, and what they decode to; the number is the column's place in the weight."""


def codes_by(weight: Tensor, hessian: Tensor, nearest: Nearest, damp_percent: float = 0.01) -> Tensor:
    """Codes, whole floats `[out, in]`, of `weight` (`[out, in]`): OPTQ in act-order, whatever rounds a column.

    `hessian` is `[in, in]`.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = inverse_cholesky(hessian[order.unsqueeze(1), order], damp_percent)[0].to(weight.dtype)
    w, places = weight.T[order], order.tolist()
    codes = torch.empty_like(w)
    for start, stop in _spans(len(w), len(w)):
        inside, corner = w[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(inside)
        for k, pivot in enumerate(corner.diagonal().tolist()):
            codes[start + k], value = nearest(inside[k], places[start + k])
            torch.sub(inside[k], value, out=errors[k]).div_(pivot)
            inside[k + 1 :].addr_(corner[k, k + 1 :], errors[k], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return torch.empty_like(codes).index_copy_(0, order, codes).T


def codes_on_grid(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int, damp_percent: float = 0.01
) -> Tensor:
    """`codes_by` on a grid that is there already: `scale` and `zero` are `[out, groups]`, `group` (`[in]`) says which
    one a column has."""
    scales, zeros = (values.T.to(weight.dtype).contiguous() for values in (scale, zero))
    steps = torch.where(scales == 0, 1, scales)  # what has a scale of 0 decodes to 0, whatever its code
    groups = group.tolist()

    def nearest(column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        s, z = scales[groups[place]], zeros[groups[place]]
        q = (column / steps[groups[place]]).add_(z).round_().clamp_(0, 2**bits - 1)
        return q, (q - z).mul_(s)

    return codes_by(weight, hessian, nearest, damp_percent)


def _round_column_(
    inside: Tensor,
    corner: Tensor,
    errors: Tensor,
    code: Tensor,
    k: int,
    pivot: float,
    scale: Tensor,
    zero: Tensor,
    bits: int,
) -> None:
    """Round column `k` of a span (each a row of `inside`) into `code`, and correct the columns of the span after it."""
    error = errors[k]
    q = torch.div(inside[k], scale, out=code).add_(zero).round_().clamp_(0, 2**bits - 1)
    torch.sub(q, zero, out=error).mul_(scale)
    torch.sub(inside[k], error, out=error).div_(pivot)
    inside[k + 1 :].addr_(corner[k, k + 1 :], error, alpha=-1)


def _spans(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Column blocks of at most `BLOCK`, or one group, that never end inside a group they did not begin with.

    So when a group begins inside a block, all of it is inside, and its weights are up to date when its grid is fitted.

    >>> list(_spans(200, 48)), list(_spans(300, 160))
    ([(0, 96), (96, 192), (192, 200)], [(0, 128), (128, 160), (160, 288), (288, 300)])
    """
    step = group * max(1, BLOCK // group)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        for block in range(start, end, BLOCK):
            yield block, min(block + BLOCK, end)
