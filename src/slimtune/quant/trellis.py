"""QTIP: rotate the weight until it looks like noise, then round 256 weights at a time to a walk through a trellis.

Source: arXiv 2406.11235, without its fine-tuning. See `slimtune.quant.incoherent` and `slimtune.linalg.trellis`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.kernels.dispatch import encode_trellis
from slimtune.linalg.trellis import STEPS, Encoder, decode
from slimtune.quant import rotated
from slimtune.quant.incoherent import Code, Incoherent
from slimtune.quant.layouts import Layout
from slimtune.quant.rotated import TILE

SPREAD = 0.95
"""Where the weights lie among the trellis' numbers: errors that are fed back widen them."""


class Walks:
    """The `Code` of walks through a trellis: a tile is sixteen rows and columns, row by row."""

    rows: ClassVar[int] = TILE
    columns: ClassVar[int] = TILE

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._encoder = Encoder(bits)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, uint8 `[m, 32 * bits]`, of `[16 m, 16]`."""
        return encode_trellis(x.reshape(-1, STEPS), self._encoder)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers, `dtype [16 m, 16]`."""
        return decode(codes, self.bits, dtype).view(-1, TILE)


@dataclass(frozen=True)
class Trellis(Incoherent):
    """Incoherence by randomised Hadamard transforms, tail-biting trellis codes, block LDLQ.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> w, x = torch.randn(16, 96, generator=g), torch.randn(500, 96, generator=g)
        >>> x = x @ torch.randn(96, 96, generator=g)
        >>> h = x.T @ x / 500
        >>> loss = lambda q: float(((q.dequantize() - w) @ h * (q.dequantize() - w)).sum())
        >>> from slimtune.quant.rtn import Rtn
        >>> loss(Trellis(bits=2)(w, {"hessian": h})) < 0.4 * loss(Rtn(bits=2, group_size=32)(w, {}))
        True
    """

    spread: ClassVar[float] = SPREAD
    code: ClassVar[Callable[[int], Code]] = Walks
    layout: ClassVar[Callable[[int, int, int], Layout]] = rotated.Trellis

    sweeps: int = field(default=1, metadata={"help": "rounds in which every block is rounded again, given the others"})
