"""Float8 (e4m3fn): a sign, 4 bits of exponent and 3 of mantissa for every weight, and a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.linalg.levels import FLOAT8, float8
from slimtune.linalg.packing import pack
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.layouts import Codebook
from slimtune.quant.rtn import check_group, group_width


@dataclass(frozen=True)
class Fp8:
    """Every weight to the nearest float8 number times a scale that puts the greatest of its row, or group, at 448.

    llm-compressor calls it FP8, and with inputs that are rounded alike (`activations: {bits: 8, type: float}`)
    FP8_DYNAMIC. The format: arXiv 2209.05433. Scales are bfloat16, and codes are chosen for the scale as stored.

    Example:
        >>> w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
        >>> q = Fp8()(w, {})
        >>> float((q.dequantize() - w).square().mean() / w.square().mean()) < 0.001, q.bits_per_weight
        (True, 8.0625)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    group_size: int = field(default=-1, metadata={"help": "input features that share a scale; -1: a whole row"})

    def __post_init__(self) -> None:
        check_group(self.group_size)

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`); `stats` is not used."""
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        rows, columns = w.shape
        layout = Codebook(rows, columns, "e4m3fn", group_width(self.group_size, columns))
        parts = pad(w, (0, layout.groups * layout.group_size - columns)).reshape(rows, layout.groups, -1)
        scale = (parts.abs().amax(-1) / FLOAT8).to(torch.bfloat16)
        scale = torch.where(scale > 0, scale, 1)  # zeros: any scale is exact
        codes = float8(parts / scale.to(w.dtype).unsqueeze(-1)).view(torch.uint8).flatten(1)[:, :columns]
        return QTensor({"codes": pack(codes.contiguous(), 8), "scale": scale}, layout)
