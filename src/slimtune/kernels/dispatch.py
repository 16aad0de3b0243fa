"""Which kernel does a thing: the fastest for its device and dtype. All equal the reference: decoding bit for bit,
products of integers (`slimtune.kernels.int8`) within float rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from slimtune.kernels.cpu import TABLED, unpack_half
from slimtune.kernels.int8 import fast
from slimtune.linalg.packing import unpack


def unpack_as(codes: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
    """The codes as fresh floats, `dtype [rows, length]`, of a tensor that `slimtune.linalg.packing.pack` made."""
    half = dtype in (torch.bfloat16, torch.float16)
    if codes.device.type == "cpu" and half and bits in TABLED and not torch.compiler.is_compiling():
        return unpack_half(codes, bits, length, dtype)
    return unpack(codes, bits, length).to(dtype)


_references = [False]


@contextmanager
def reference() -> Iterator[None]:
    """Within the block, products are those of the reference: what is rounded to integers is multiplied in floats."""
    _references.append(True)
    try:
        yield
    finally:
        _references.pop()


def integers_wanted(x: Tensor) -> bool:
    """Whether a product with `x`, rounded to at most 8 bits, runs in integers: in inference, on a CPU with units for
    it. A graph is captured, and a gradient taken, of the reference."""
    return (
        not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _references[-1])
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and fast()
    )
