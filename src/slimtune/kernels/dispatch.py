"""Which kernel does a thing: the fastest for its device and dtype. All equal the reference, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.kernels.cpu import TABLED, unpack_half
from slimtune.linalg.packing import unpack


def unpack_as(codes: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
    """The codes as fresh floats, `dtype [rows, length]`, of a tensor that `slimtune.linalg.packing.pack` made."""
    half = dtype in (torch.bfloat16, torch.float16)
    if codes.device.type == "cpu" and half and bits in TABLED and not torch.compiler.is_compiling():
        return unpack_half(codes, bits, length, dtype)
    return unpack(codes, bits, length).to(dtype)
