"""A weight that was in few bits, changed a little, back into the same layout: several ways, and the best of them.

The old codes are always among the ways: at 2 bits a small change is often lost less by keeping what is there than by
rounding everything anew. The grid that is there is another, a new one of the same kind a third.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from slimtune.errors import FormatError
from slimtune.linalg.packing import pack
from slimtune.quant.base import QTensor, Stats, relative_error
from slimtune.quant.hqq import Hqq
from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.nf4 import Nf4
from slimtune.quant.optq import Optq, codes_on_grid
from slimtune.quant.quip import Quip
from slimtune.quant.rotated import Lattice
from slimtune.quant.rotated import Trellis as TrellisLayout
from slimtune.quant.rtn import AFFINE_BITS, Rtn
from slimtune.quant.scattered import Scattered
from slimtune.quant.trellis import Trellis

Ways = Callable[[QTensor, Tensor, "Tensor | None"], list[QTensor]]


@dataclass(frozen=True)
class Again:
    """A quantizer for one weight: into the layout of `old`, with the least error of the layer's outputs."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    old: QTensor

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`) given `stats["hessian"]`.

        Raises `FormatError` for a layout that nothing here makes.
        """
        return requantize(self.old, weight, stats["hessian"])


@dataclass(frozen=True)
class AgainBlind:
    """The same without calibration: with the least error of the weights."""

    needs: ClassVar[frozenset[str]] = frozenset()

    old: QTensor

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`)."""
        return requantize(self.old, weight, None)


def requantize(old: QTensor, weight: Tensor, hessian: Tensor | None) -> QTensor:
    """`weight` (float `[out, in]`) in the layout of `old`: of all ways, the one with the least error.

    Raises `FormatError` for a layout that nothing here makes.

    Example:
        >>> w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        >>> old = Rtn(bits=4, group_size=32)(w, {})
        >>> requantize(old, old.dequantize(), None) is old
        True
        >>> requantize(old, 1.5 * w, None).layout == old.layout
        True
    """
    ways = WAYS.get(type(old.layout))
    if ways is None:
        raise FormatError("weights of this layout cannot be made again", got=old.layout.tag, remedy="merge: {}")
    w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    if torch.equal(old.dequantize(w.dtype), w):
        return old
    return min([old, *ways(old, w, hessian)], key=lambda way: relative_error(w, way.dequantize(w.dtype), hessian))


def _affine(old: QTensor, w: Tensor, hessian: Tensor | None) -> list[QTensor]:
    layout = cast("Affine | Scattered", old.layout)
    half = torch.full_like(old.tensors["scale"], 2 ** (layout.bits - 1))
    kept = {"zero": half, **old.tensors}
    if isinstance(layout, Scattered):
        return [_on_grid(old, w, hessian, kept, old.tensors["group"].long())]
    group = torch.arange(layout.in_features, device=w.device) // layout.group_size
    made = [_on_grid(old, w, hessian, kept, group)]
    if layout.scale_dtype != "bfloat16" or layout.bits not in AFFINE_BITS:
        return made  # others made it, in a way that no quantizer here has
    bits, size = layout.bits, layout.group_size
    if layout.float_zero:
        fresh = Hqq(bits=bits, group_size=size)(w, {})
        made.append(fresh if hessian is None else _on_grid(fresh, w, hessian, fresh.tensors, group))
    elif hessian is None:
        made.append(Rtn(bits=bits, group_size=size, sym=layout.symmetric)(w, {}))
    else:
        made.append(Optq(bits=bits, group_size=size, sym=layout.symmetric)(w, {"hessian": hessian}))
    return made


def _on_grid(old: QTensor, w: Tensor, hessian: Tensor | None, grid: dict[str, Tensor], group: Tensor) -> QTensor:
    """`w` on a grid that is there: to the nearest level, or with error feedback."""
    layout = cast("Affine | Scattered", old.layout)
    scale, zero = grid["scale"].to(w.dtype), grid["zero"].to(w.dtype)
    scale = torch.where(scale == 0, 1, scale)
    if hessian is None:
        codes = (w / scale[:, group] + zero[:, group]).round_().clamp_(0, 2**layout.bits - 1)
    else:
        codes = codes_on_grid(w, hessian, scale, zero, group, layout.bits)
    return QTensor({**old.tensors, "codes": pack(codes.to(torch.uint8), layout.bits)}, layout)


def _codebook(old: QTensor, w: Tensor, hessian: Tensor | None) -> list[QTensor]:
    layout = cast(Codebook, old.layout)
    return [Nf4(block_size=layout.group_size, double_quant=layout.nested)(w, {})]


def _lattice(old: QTensor, w: Tensor, hessian: Tensor | None) -> list[QTensor]:
    return [Quip(bits=cast(Lattice, old.layout).bits)(w, _stats(w, hessian))]


def _trellis(old: QTensor, w: Tensor, hessian: Tensor | None) -> list[QTensor]:
    return [Trellis(bits=cast(TrellisLayout, old.layout).bits)(w, _stats(w, hessian))]


def _stats(w: Tensor, hessian: Tensor | None) -> Stats:
    return {"hessian": torch.eye(w.shape[1], device=w.device) if hessian is None else hessian}


WAYS: dict[type[Layout], Ways] = {
    Affine: _affine,
    Scattered: _affine,
    Codebook: _codebook,
    Lattice: _lattice,
    TrellisLayout: _trellis,
}
"""How a weight gets into each layout again."""
