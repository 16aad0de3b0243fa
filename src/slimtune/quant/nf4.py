"""NormalFloat: 16 levels that are equally likely for normal weights, and scales that are quantized too (QLoRA)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.errors import RecipeError
from slimtune.linalg.levels import LEVELS
from slimtune.linalg.packing import pack
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.layouts import Codebook
from slimtune.quant.rtn import group_width


@dataclass(frozen=True)
class Nf4:
    """Every weight to the nearest NormalFloat4 level times the greatest magnitude of its block.

    Blocks are runs of input features within a row. Their scales are stored in 8 bits, evenly spaced between the least
    and the greatest scale of the row, and the levels are chosen for the scales as stored (arXiv 2305.14314, section 3;
    there scales are 8-bit floats and share a mean and a range across 256 blocks, rows aside).

    Example:
        >>> w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
        >>> q = Nf4()(w, {})
        >>> float((q.dequantize() - w).square().mean() / w.square().mean()) < 0.01, q.bits_per_weight
        (True, 4.25)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    block_size: int = field(default=64, metadata={"help": "input features that share a scale; -1: a whole row"})

    def __post_init__(self) -> None:
        if self.block_size != -1 and self.block_size < 1:
            raise RecipeError(
                "block_size out of range",
                where="block_size",
                got=self.block_size,
                wanted="a positive number, or -1 for whole rows",
            )

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`); `stats` is not used."""
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        rows, columns = w.shape
        layout = Codebook(rows, columns, "nf4", group_width(self.block_size, columns))
        size = layout.group_size
        blocks = pad(w, (0, layout.groups * size - columns)).reshape(rows, layout.groups, size)
        wanted = blocks.abs().amax(-1)
        low, high = wanted.amin(1, keepdim=True), wanted.amax(1, keepdim=True)
        offset = low.to(torch.bfloat16)
        step = ((high - offset) / 255).clamp(min=0).to(torch.bfloat16)
        apart = torch.where(step > 0, step, 1).to(w.dtype)
        coarse = ((wanted - offset) / apart).round().clamp(0, 255).where(step > 0, 0)
        scale = (offset + coarse * step).unsqueeze(-1)
        levels = torch.tensor(LEVELS["nf4"], dtype=w.dtype, device=w.device)
        between = (levels[1:] + levels[:-1]) / 2
        # Where the stored scale is 0 every level decodes to 0: any code will do.
        nearest = torch.bucketize((blocks / torch.where(scale > 0, scale, 1)).contiguous(), between)
        codes = nearest.view(rows, -1)[:, :columns]
        tensors = {"codes": pack(codes.to(torch.uint8), 4), "scale": coarse.to(torch.uint8).contiguous()}
        return QTensor({**tensors, "step": step, "offset": offset}, layout)
