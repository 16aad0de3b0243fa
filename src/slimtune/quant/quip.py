"""QuIP#: rotate the weight until it looks like noise, then round eight weights at a time to a lattice.

Source: arXiv 2402.04396, without its fine-tuning. See `slimtune.quant.incoherent`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.linalg.lattice import WIDTH, decode, encode
from slimtune.quant.incoherent import Code, Incoherent
from slimtune.quant.layouts import Layout
from slimtune.quant.rotated import Lattice

SPREAD = 0.95
"""Where the weights lie in the lattice: errors that are fed back widen them."""


@dataclass(frozen=True)
class Points:
    """The `Code` of lattice points: a tile is eight columns of a row."""

    bits: int
    rows: ClassVar[int] = 1
    columns: ClassVar[int] = WIDTH

    def encode(self, x: Tensor) -> Tensor:
        """Codes, uint8 `[m, bits]`, of `[m, 8]`."""
        return encode(x, self.bits)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The points, `dtype [m, 8]`."""
        return decode(codes, dtype)


@dataclass(frozen=True)
class Quip(Incoherent):
    """Incoherence by randomised Hadamard transforms, E8P lattice codes, block LDLQ.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> w, x = torch.randn(8, 96, generator=g), torch.randn(500, 96, generator=g) @ torch.randn(96, 96, generator=g)
        >>> h = x.T @ x / 500
        >>> loss = lambda q: float(((q.dequantize() - w) @ h * (q.dequantize() - w)).sum())
        >>> from slimtune.quant.rtn import Rtn
        >>> loss(Quip(bits=2)(w, {"hessian": h})) < 0.6 * loss(Rtn(bits=2, group_size=32)(w, {}))
        True
    """

    spread: ClassVar[float] = SPREAD
    code: ClassVar[Callable[[int], Code]] = Points
    layout: ClassVar[Callable[[int, int, int], Layout]] = Lattice

    sweeps: int = field(default=1, metadata={"help": "rounds in which every block is rounded again, given the others"})
