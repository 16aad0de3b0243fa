"""QTIP: rotate the weight until it looks like noise, then round 256 weights at a time to a walk through a trellis.

Source: arXiv 2406.11235, without its fine-tuning. See `slimtune.quant.incoherent` and `slimtune.linalg.trellis`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.linalg.hessian import aligned
from slimtune.linalg.trellis import STEPS, Encoder, decode
from slimtune.quant import rotated
from slimtune.quant.base import QTensor, Stats, check_share
from slimtune.quant.incoherent import BITS, check, quantize
from slimtune.quant.rotated import TILE

SPREAD = 0.95
"""Where the weights lie among the trellis' numbers: errors that are fed back widen them."""


@dataclass(frozen=True)
class Trellis:
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

    widths: ClassVar[tuple[int, ...]] = BITS

    bits: int = field(default=2, metadata={"help": "bits of a weight: 2, 3 or 4"})
    damp_percent: float = field(default=0.01, metadata={"help": "dampening, a fraction of the Hessian's mean diagonal"})
    sweeps: int = field(default=0, metadata={"help": "rounds in which every block is rounded again, given the others"})
    seed: int = field(default=0, metadata={"help": "of the random signs"})
    gptaq: float = field(
        default=0.0, metadata={"help": "share of the drift of the inputs to make up for (GPTAQ: 0.25); a pass more"}
    )

    def __post_init__(self) -> None:
        check(self.bits, self.damp_percent, self.sweeps)
        check_share(self.gptaq)

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian of the inputs, and their drift from the dense model's where weights make up for it."""
        return frozenset({"hessian", "drift"} if self.gptaq else {"hessian"})

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`) given `stats["hessian"]` (`[in, in]`). Float64 weights stay float64."""
        if self.gptaq:
            weight = aligned(weight, stats["hessian"], stats["drift"], self.gptaq)
        tensors = quantize(
            weight, stats, Walks(self.bits), spread=SPREAD, damp=self.damp_percent, seed=self.seed, sweeps=self.sweeps
        )
        rows, columns = weight.shape
        return QTensor(tensors, rotated.Trellis(rows, columns, self.bits))


class Walks:
    """The `Code` of walks through a trellis: a tile is sixteen rows and columns, row by row."""

    rows: ClassVar[int] = TILE
    columns: ClassVar[int] = TILE

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._encoder = Encoder(bits)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, uint8 `[m, 32 * bits]`, of `[16 m, 16]`."""
        return self._encoder(x.reshape(-1, STEPS))

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers, `dtype [16 m, 16]`."""
        return decode(codes, self.bits, dtype).view(-1, TILE)
