"""QuIP#: rotate the weight until it looks like noise, then round eight weights at a time to a lattice.

Source: arXiv 2402.04396. Random signs and a Hadamard-type transform on both sides make the weights nearly normal and
independent, and the Hessian is turned alike. Blocks of eight columns are then rounded one after another, and the
columns still to come make up for the error ("block LDLQ"). With `U` the upper factor of the damped `H⁻¹` that OPTQ
uses, too, the error of block `k` that is fed forward is `(w_k - q_k) U_kk⁻¹ U_k`; a paper that goes from the last block
to the first has the same result for columns in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.errors import RecipeError, ShapeError
from slimtune.linalg.hadamard import transform
from slimtune.linalg.hessian import inverse_cholesky
from slimtune.linalg.lattice import WIDTH, decode, encode
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.lattice import Lattice, pack_codes

BLOCK = 128
"""Columns whose corrections are gathered before the rest of the weight is touched (a speed choice, not a result)."""
SPREAD = {2: 0.9, 4: 0.9}
"""Root mean square of what is encoded: less than is best for the weights alone, since fed-back errors widen them."""


@dataclass(frozen=True)
class Quip:
    """QuIP# without fine-tuning: incoherence by randomised Hadamard transforms, E8P lattice codes, block LDLQ.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> w, x = torch.randn(8, 96, generator=g), torch.randn(500, 96, generator=g) @ torch.randn(96, 96, generator=g)
        >>> h = x.T @ x / 500
        >>> loss = lambda q: float(((q.dequantize() - w) @ h * (q.dequantize() - w)).sum())
        >>> from slimtune.quant.optq import Optq
        >>> loss(Quip(bits=2)(w, {"hessian": h})) < loss(Optq(bits=2, group_size=-1)(w, {"hessian": h}))
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    widths: ClassVar[tuple[int, ...]] = (2, 4)

    bits: int = field(default=2, metadata={"help": "bits of a weight: 2 or 4"})
    damp_percent: float = field(default=0.01, metadata={"help": "dampening, a fraction of the Hessian's mean diagonal"})
    seed: int = field(default=0, metadata={"help": "of the random signs"})

    def __post_init__(self) -> None:
        if self.bits not in self.widths:
            raise RecipeError("bits out of range", where="bits", got=self.bits, wanted=f"one of {self.widths}")
        if not 0 < self.damp_percent < 1:
            raise RecipeError("damp_percent out of range", got=self.damp_percent, wanted="between 0 and 1")

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`) given `stats["hessian"]` (`[in, in]`). Float64 weights stay float64."""
        h = stats["hessian"]
        rows, columns = weight.shape
        if tuple(h.shape) != (columns, columns):
            raise ShapeError("the Hessian does not fit the weight", got=list(h.shape), wanted=[columns, columns])
        generator = torch.Generator().manual_seed(self.seed)
        sign_in, sign_out = (_signs(size, generator).to(weight.device) for size in (columns, rows))
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        padding = -columns % WIDTH
        w = torch.nn.functional.pad(w * sign_in * sign_out[:, None], (0, padding))
        h = torch.nn.functional.pad(h.double() * sign_in * sign_in[:, None], (0, padding, 0, padding))
        w, h = transform(transform(w), 0), transform(transform(h), 0)
        scale = (w.square().mean().sqrt() / SPREAD[self.bits]).to(torch.bfloat16)
        upper, _ = inverse_cholesky(h, self.damp_percent)
        divisor = torch.where(scale > 0, scale, 1).to(w.dtype)  # an all-zero weight has the scale 0 and any codes
        codes = block_ldlq(w / divisor, upper.to(w.dtype), lambda x: encode(x, self.bits))
        layout = Lattice(rows, columns, self.bits)
        signs = {"sign_out": sign_out.to(torch.bfloat16) * scale, "sign_in": sign_in.to(torch.bfloat16)}
        return QTensor({"codes": pack_codes(codes), **signs}, layout)


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).float().mul_(2).sub_(1)


def block_ldlq(w: Tensor, upper: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes `[out, in / 8, stages]` of `w` (`[out, in]`), block by block with error feedback.

    `upper` is the factor of `inverse_cholesky`; `encode` turns vectors `[out, 8]` into codes `[out, stages]`.
    """
    w = w.clone()
    codes = []
    for start in range(0, w.shape[1], BLOCK):
        inside = w[:, start : start + BLOCK]
        corner = upper[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(inside)
        for k in range(0, inside.shape[1], WIDTH):
            here, after = slice(k, k + WIDTH), slice(k + WIDTH, None)
            code = encode(inside[:, here])
            off = inside[:, here] - decode(code, w.dtype)
            errors[:, here] = torch.linalg.solve_triangular(corner[here, here], off, upper=True, left=False)
            inside[:, after].addmm_(errors[:, here], corner[here, after], alpha=-1)
            codes.append(code)
        w[:, start + BLOCK :].addmm_(errors, upper[start : start + BLOCK, start + BLOCK :], alpha=-1)
    return torch.stack(codes, 1)
