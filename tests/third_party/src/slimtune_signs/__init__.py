"""Somebody else's quantizers: one stores its result in a layout of slimtune's, the other in a layout of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.errors import RecipeError
from slimtune.linalg.packing import pack, row_bytes, unpack
from slimtune.quant import QTensor
from slimtune.quant.layouts import Affine


@dataclass(frozen=True)
class Ternary:
    """Every weight to -s, 0 or s, with s the mean magnitude of its row (BitNet b1.58, arXiv 2402.17764)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    threshold: float = field(default=0.5, metadata={"help": "magnitudes below this times s become zero"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise RecipeError("threshold out of range", where="threshold", got=self.threshold, wanted="0 to 1")

    def __call__(self, weight: Tensor, stats: Mapping[str, Tensor]) -> QTensor:
        """Quantize `weight` (`[out, in]`) to 2-bit codes around 2, one scale a row."""
        w = weight.float()
        scale = w.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).to(torch.bfloat16)
        codes = w.sign() * (w.abs() > self.threshold * scale.float()) + 2
        layout = Affine(*weight.shape, bits=2, group_size=weight.shape[1], symmetric=True)
        return QTensor({"codes": pack(codes.to(torch.uint8), 2), "scale": scale}, layout)


@dataclass(frozen=True)
class SignLayout:
    """One bit a weight, and a magnitude for each row and each column: `W[o, i] = ±row[o] * column[i]`.

    The magnitudes of the columns are repeated in every row's shard, in steps of 1/255: dim 0 is always out_features.
    """

    tag: ClassVar[str] = "signs"
    rowwise: ClassVar[bool] = True

    out_features: int
    in_features: int

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        return {
            "bits": ((self.out_features, row_bytes(self.in_features, 1)), torch.uint8),
            "row": ((self.out_features, 1), torch.float32),
            "column": ((self.out_features, self.in_features), torch.uint8),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`."""
        signs = 2 * unpack(tensors["bits"], 1, self.in_features).to(dtype) - 1
        return signs * tensors["row"].to(dtype) * (tensors["column"].to(dtype) / 255)


@dataclass(frozen=True)
class Signs:
    """Signs, and the least-squares product of row and column magnitudes, weighted by how active the inputs are."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __call__(self, weight: Tensor, stats: Mapping[str, Tensor]) -> QTensor:
        """Quantize `weight` (`[out, in]`) given `stats["hessian"]`."""
        size, active = weight.float().abs(), stats["hessian"].diagonal()
        column = size.mean(0)
        column = column / column.max().clamp(min=torch.finfo(torch.float32).tiny)
        stored = (255 * column).round().clamp(min=1)
        row = (size * stored / 255 * active).sum(1, keepdim=True) / ((stored / 255) ** 2 * active).sum()
        tensors = {
            "bits": pack((weight >= 0).to(torch.uint8), 1),
            "row": row.float(),
            "column": stored.to(torch.uint8).expand(weight.shape).contiguous(),
        }
        return QTensor(tensors, SignLayout(*weight.shape))
