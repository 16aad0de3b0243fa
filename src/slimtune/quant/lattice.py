"""The layout of lattice codes in a rotated basis: eight weights are one point, or the sum of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.linalg.hadamard import transform
from slimtune.linalg.lattice import WIDTH, decode


@dataclass(frozen=True)
class Lattice:
    """`W = diag(sign_out) Hᵀ C H diag(sign_in)`, with `C` read from codes of eight columns and `H` orthogonal.

    Rows of the codes are rows of the rotated weight, so a slice of them is no smaller weight (`rowwise`). `sign_out`
    carries the scale of the whole matrix. Both signs are bfloat16, for the reason that the scales of `Affine` are;
    quantizers fit the codes to the rounded scale. Columns are padded to a multiple of eight with zeros.

    Example:
        >>> Lattice(out_features=4, in_features=20, bits=2).tensors()["codes"]
        ((4, 6), torch.uint8)
    """

    tag: ClassVar[str] = "e8p"
    rowwise: ClassVar[bool] = False

    out_features: int
    in_features: int
    bits: int

    @property
    def blocks(self) -> int:
        """Codes of a row and stage."""
        return -(-self.in_features // WIDTH)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        return {
            "codes": ((self.out_features, self.blocks * self.bits), torch.uint8),
            "sign_out": ((self.out_features,), torch.bfloat16),
            "sign_in": ((self.in_features,), torch.bfloat16),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`; computed in float32 at least, rounded once."""
        work = torch.promote_types(dtype, torch.float32)
        rotated = decode(unpack_codes(tensors["codes"], self.bits), work).flatten(1)
        plain = transform(transform(rotated, inverse=True), 0, inverse=True)[:, : self.in_features]
        return (plain * tensors["sign_out"].to(work)[:, None] * tensors["sign_in"].to(work)).to(dtype)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes `[out, blocks, stages]` as uint8 `[out, bytes]`, two bytes each, the low one first."""
    return torch.stack([codes & 255, codes >> 8], -1).to(torch.uint8).flatten(1)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The codes, int32 `[out, blocks, bits / 2]`, of what `pack_codes` made.

    >>> unpack_codes(pack_codes(torch.tensor([[[7, 65535]]])), bits=4)
    tensor([[[    7, 65535]]], dtype=torch.int32)
    """
    low, high = packed.view(len(packed), -1, bits // 2, 2).int().unbind(-1)
    return low | high << 8
