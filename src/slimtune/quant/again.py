"""A weight that was in few bits, changed a little, back into the same layout: several ways, and the best of them.

Rounding to the nearest codes, or with error feedback, is the wrong thing for a change that is small beside the steps of
a grid: most codes stay, and with them most of the change is gone. What is left out then is no noise, but the very
direction in which the loss fell. So a change is made larger before it is rounded, until what arrives of it (measured by
the Hessian) is all of it, on average, or as near as a few trials come; and of several ways the one is taken that adds
the least noise, where a part of the change that is lost weighs `UPDATE` times as much. The old codes are among the
ways, and so is a new grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from slimtune.errors import FormatError
from slimtune.linalg.levels import LEVELS
from slimtune.linalg.packing import pack
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.fp8 import Fp8
from slimtune.quant.hqq import Hqq
from slimtune.quant.incoherent import Incoherent
from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.nf4 import Nf4
from slimtune.quant.optq import Optq, codes_by, codes_on_grid
from slimtune.quant.quip import Quip
from slimtune.quant.rotated import Lattice
from slimtune.quant.rotated import Trellis as TrellisLayout
from slimtune.quant.rtn import AFFINE_BITS, Rtn
from slimtune.quant.scattered import Scattered
from slimtune.quant.trellis import Trellis

Way = Callable[[QTensor, Tensor, "Tensor | None"], QTensor]

UPDATE = 50.0
"""How much more a lost part of the change costs than noise of the same energy. Measured on SmolLM2, 4 bits, 50 steps of
training: losing the whole adapter cost 60 times the loss, for its energy, that rounding the weights had cost."""

LARGEST = 6.0
"""How many times larger a change is made at most."""


@dataclass(frozen=True)
class Again:
    """A quantizer for one weight: into the layout of `old`, what changed and noise measured on the layer's outputs."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    old: QTensor

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`) given `stats["hessian"]`.

        Raises `FormatError` for a layout that nothing here makes.
        """
        return requantize(self.old, weight, stats["hessian"])


@dataclass(frozen=True)
class AgainBlind:
    """The same without calibration: measured on the weights."""

    needs: ClassVar[frozenset[str]] = frozenset()

    old: QTensor

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`)."""
        return requantize(self.old, weight, None)


def requantize(old: QTensor, weight: Tensor, hessian: Tensor | None) -> QTensor:
    """`weight` (float `[out, in]`) in the layout of `old`: of all ways, the one that costs least (`judged`).

    Raises `FormatError` for a layout that nothing here makes.

    Example:
        >>> w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        >>> old = Rtn(bits=4, group_size=32)(w, {})
        >>> requantize(old, old.dequantize(), None) is old
        True
        >>> requantize(old, 1.5 * w, None).layout == old.layout
        True
    """
    way = WAYS.get(type(old.layout))
    if way is None:
        raise FormatError("weights of this layout cannot be made again", got=old.layout.tag, remedy="merge: {}")
    w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    before = old.dequantize(w.dtype)
    if torch.equal(before, w):
        return old
    change = w - before
    found = [judged(old, before, change, hessian)]
    if (anew := fresh(old.layout, w, hessian)) is not None:
        found.append(judged(anew, before, change, hessian))
    tried: list[tuple[float, float]] = []
    while (factor := _next(tried, SLOW if type(old.layout) in TURNED else QUICK)) is not None:
        found.append(judged(way(old, before + factor * change, hessian), before, change, hessian))
        tried.append((factor, found[-1].share))
    return min(found, key=lambda one: one.cost).weight


@dataclass(frozen=True)
class Judged:
    """A way, the `share` of the change that arrives by it, and what it costs: relative to the change's own energy."""

    weight: QTensor
    share: float
    cost: float


def judged(way: QTensor, before: Tensor, change: Tensor, hessian: Tensor | None) -> Judged:
    """`way` as an approximation of `before + change`, float `[out, in]`.

    What it adds to `before` is `share * change` and noise `N` that is orthogonal to the change in the Hessian's metric;
    it costs `tr(N H Nᵀ) / tr(C H Cᵀ) + UPDATE * (1 - share)²`.
    """
    added = way.dequantize(before.dtype) - before
    weighed = change if hessian is None else change @ hessian.to(change.dtype)
    energy = max(float((weighed * change).sum()), torch.finfo(torch.float32).tiny)
    share = float((weighed * added).sum()) / energy
    noise = added.sub_(change, alpha=share)
    noisy = float(((noise if hessian is None else noise @ hessian.to(noise.dtype)) * noise).sum())
    return Judged(way, share, max(noisy, 0.0) / energy + UPDATE * (1 - share) ** 2)


QUICK, SLOW = 4, 2
"""How often a change is rounded at most: where that is quick, and where it takes as long as quantizing anew."""

NEAR, FLAT = 0.05, 0.01
"""A share this near to 1 will do; and where a factor larger by one adds less than this, there is nothing to gain."""


def _next(tried: list[tuple[float, float]], most: int) -> float | None:
    """By how much to enlarge the change, after factors and the shares that arrived; None when that is enough.

    >>> _next([(1.0, 0.25)], 2), _next([(1.0, 0.2), (2.0, 1.2)], 4), _next([(1.0, 1.02)], 4)
    (4.0, 1.8, None)
    """
    if not tried:
        return 1.0
    (b, high), (a, low) = tried[-1], tried[-2] if len(tried) > 1 else (0.0, 0.0)
    slope = (high - low) / (b - a) if a != b else 0.0
    if len(tried) >= most or abs(high - 1) < NEAR or (len(tried) > 1 and slope < FLAT):
        return None
    if len(tried) == 1 and most > 2 and high < 1:
        return 2.0  # shares of small changes rise late: a line through nothing would overshoot
    return min(max(b + (1 - high) / max(slope, FLAT), 0.5), LARGEST)


def _affine(old: QTensor, w: Tensor, hessian: Tensor | None) -> QTensor:
    layout = cast("Affine | Scattered", old.layout)
    half = torch.full_like(old.tensors["scale"], 2 ** (layout.bits - 1))
    kept = {"zero": half, **old.tensors}
    if isinstance(layout, Scattered):
        return _on_grid(old, w, hessian, kept, old.tensors["group"].long())
    return _on_grid(old, w, hessian, kept, torch.arange(layout.in_features, device=w.device) // layout.group_size)


def fresh(layout: Layout, w: Tensor, hessian: Tensor | None) -> QTensor | None:
    """`w`, of any shape, on a new grid like that of `layout`; None where that has none, or others made it, in a way
    that no quantizer here has."""
    if isinstance(layout, Codebook) and layout.levels == "nf4":
        return Nf4(block_size=layout.group_size, double_quant=layout.nested)(w, {})
    if isinstance(layout, Codebook) and layout.is_float8 and layout.scale_dtype == "bfloat16":
        return Fp8(group_size=layout.group_size)(w, {})
    if not isinstance(layout, Affine):
        return None
    bits, size = layout.bits, layout.group_size
    if layout.scale_dtype != "bfloat16" or bits not in AFFINE_BITS:
        return None
    if layout.float_zero:
        fitted = Hqq(bits=bits, group_size=size)(w, {})
        group = torch.arange(w.shape[1], device=w.device) // size
        return fitted if hessian is None else _on_grid(fitted, w, hessian, fitted.tensors, group)
    if hessian is None:
        return Rtn(bits=bits, group_size=size, sym=layout.symmetric)(w, {})
    return Optq(bits=bits, group_size=size, sym=layout.symmetric)(w, {"hessian": hessian})


def _on_grid(old: QTensor, w: Tensor, hessian: Tensor | None, grid: dict[str, Tensor], group: Tensor) -> QTensor:
    """`w` on a grid that is there: to the nearest level, or with error feedback."""
    layout = cast("Affine | Scattered", old.layout)
    scale, zero = grid["scale"].to(w.dtype), grid["zero"].to(w.dtype)
    if hessian is None:
        steps = torch.where(scale == 0, 1, scale)[:, group]
        codes = (w / steps + zero[:, group]).round_().clamp_(0, 2**layout.bits - 1)
    else:
        codes = codes_on_grid(w, hessian, scale, zero, group, layout.bits)
    return QTensor({**old.tensors, "codes": pack(codes.to(torch.uint8), layout.bits)}, layout)


def _codebook(old: QTensor, w: Tensor, hessian: Tensor | None) -> QTensor:
    layout = cast(Codebook, old.layout)
    levels, order = torch.tensor(LEVELS[layout.levels], dtype=w.dtype, device=w.device).sort()
    levels = levels[levels.isfinite()]  # what is no number is sorted to the end
    between = (levels[1:] + levels[:-1]) / 2
    scale = layout.scales(old.tensors, w.dtype).repeat_interleave(layout.group_size, 1)[:, : layout.in_features]
    apart = torch.where(scale > 0, scale, 1)  # where it is 0 every level decodes to 0: any code will do
    if hessian is None:
        codes = order[torch.bucketize((w / apart).contiguous(), between)]
    else:
        scales, steps = scale.T.contiguous(), apart.T.contiguous()

        def nearest(column: Tensor, place: int) -> tuple[Tensor, Tensor]:
            found = torch.bucketize(column / steps[place], between)
            return order[found].to(w.dtype), levels[found] * scales[place]

        codes = codes_by(w, hessian, nearest)
    return QTensor({**old.tensors, "codes": pack(codes.to(torch.uint8), layout.bits)}, layout)


def _turned(old: QTensor, w: Tensor, hessian: Tensor | None) -> QTensor:
    metric = torch.eye(w.shape[1], device=w.device) if hessian is None else hessian
    return TURNED[type(old.layout)](bits=cast("Lattice | TrellisLayout", old.layout).bits)(w, {"hessian": metric})


TURNED: dict[type[Layout], type[Incoherent]] = {Lattice: Quip, TrellisLayout: Trellis}
"""The layouts in a rotated basis, and the quantizers that make them."""


WAYS: dict[type[Layout], Way] = {
    Affine: _affine,
    Scattered: _affine,
    Codebook: _codebook,
    Lattice: _turned,
    TrellisLayout: _turned,
}
"""How a weight gets into each layout again: on the grid that is there, where there is one."""
