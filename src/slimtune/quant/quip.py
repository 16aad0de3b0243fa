"""QuIP#: rotate the weight until it looks like noise, then round eight weights at a time to a lattice.

Source: arXiv 2402.04396, without its fine-tuning. See `slimtune.quant.incoherent`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.linalg.hessian import aligned
from slimtune.linalg.lattice import WIDTH, decode, encode
from slimtune.quant.base import QTensor, Stats, check_share
from slimtune.quant.incoherent import BITS, check, quantize
from slimtune.quant.rotated import Lattice

SPREAD = 0.95
"""Where the weights lie in the lattice: errors that are fed back widen them."""


@dataclass(frozen=True)
class Quip:
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

    widths: ClassVar[tuple[int, ...]] = BITS

    bits: int = field(default=2, metadata={"help": "bits of a weight: 2, 3 or 4"})
    damp_percent: float = field(default=0.01, metadata={"help": "dampening, a fraction of the Hessian's mean diagonal"})
    sweeps: int = field(default=1, metadata={"help": "rounds in which every block is rounded again, given the others"})
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
            weight, stats, Points(self.bits), spread=SPREAD, damp=self.damp_percent, seed=self.seed, sweeps=self.sweeps
        )
        rows, columns = weight.shape
        return QTensor(tensors, Lattice(rows, columns, self.bits))


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
