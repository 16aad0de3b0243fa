"""Which kernel decodes a weight: the fastest for its device and dtype. All equal the reference, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.kernels import reference
from slimtune.kernels.cpu import TABLED, unpack_half
from slimtune.kernels.reference import scaled


def dequantize_affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `slimtune.kernels.reference.dequantize_affine`."""
    whole = zero is None or not zero.is_floating_point()  # else the arithmetic is not in half precision
    tabled = bits in TABLED and dtype in (torch.bfloat16, torch.float16)
    if codes.device.type == "cpu" and whole and tabled and not torch.compiler.is_compiling():
        return scaled(unpack_half(codes, bits, in_features, dtype), scale, zero, bits, group_size)
    return reference.dequantize_affine(
        codes, scale, zero, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype
    )
