"""NormalFloat: 16 levels that are equally likely for normal weights, and scales that are quantized too (QLoRA)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.linalg.levels import LEVELS
from slimtune.linalg.packing import pack
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.layouts import NEST, Codebook
from slimtune.quant.rtn import check_group, group_width


@dataclass(frozen=True)
class Nf4:
    """Every weight to the nearest NormalFloat4 level times the greatest magnitude of its block (arXiv 2305.14314).

    Blocks are runs of input features within a row, as all groups here; bitsandbytes' run through the rows, which is the
    same where the block size divides the width. With `double_quant`, the scales of up to 256 blocks of a row are stored
    in 8 bits, evenly spaced between the least and the greatest, and levels are chosen for the scales as stored. QLoRA
    spaces them unevenly around the mean and runs through the rows here, too.

    Example:
        >>> w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
        >>> q = Nf4()(w, {})
        >>> float((q.dequantize() - w).square().mean() / w.square().mean()) < 0.01, q.bits_per_weight
        (True, 4.25)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    block_size: int = field(default=64, metadata={"help": "input features that share a scale; -1: a whole row"})
    double_quant: bool = field(default=True, metadata={"help": "store the scales in 8 bits"})

    def __post_init__(self) -> None:
        check_group(self.block_size, "block_size")

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`); `stats` is not used."""
        w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
        rows, columns = w.shape
        layout = Codebook(rows, columns, "nf4", group_width(self.block_size, columns), self.double_quant)
        blocks = pad(w, (0, layout.groups * layout.group_size - columns)).reshape(rows, layout.groups, -1)
        magnitude = blocks.abs().amax(-1)
        tensors = nest(magnitude) if self.double_quant else {"scale": magnitude.to(torch.bfloat16)}
        scale = layout.scales(tensors, w.dtype).unsqueeze(-1)
        levels = torch.tensor(LEVELS["nf4"], dtype=w.dtype, device=w.device)
        # Where the stored scale is 0 every level decodes to 0: any code will do.
        unit = blocks / torch.where(scale > 0, scale, 1)
        codes = torch.bucketize(unit.flatten(1).contiguous(), (levels[1:] + levels[:-1]) / 2)[:, :columns]
        return QTensor({"codes": pack(codes.to(torch.uint8), 4), **tensors}, layout)


def nest(scale: Tensor) -> dict[str, Tensor]:
    """The tensors of nested scales (`slimtune.quant.layouts.Codebook`) for `scale` (`[rows, groups]`, not negative)."""
    groups = scale.shape[1]
    filled = torch.cat([scale, scale[:, -1:].expand(-1, -groups % NEST)], 1).unflatten(1, (-1, NEST))
    offset, high = filled.amin(-1).to(torch.bfloat16), filled.amax(-1)
    step = ((high - offset) / 255).clamp(min=0).to(torch.bfloat16)
    apart = torch.where(step > 0, step, 1).to(scale.dtype).unsqueeze(-1)
    codes = ((filled - offset.unsqueeze(-1)) / apart).round().clamp(0, 255).where(step.unsqueeze(-1) > 0, 0)
    return {"scale": codes.flatten(1)[:, :groups].to(torch.uint8).contiguous(), "step": step, "offset": offset}
