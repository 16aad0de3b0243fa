"""Which kernel does a thing: the fastest for its device and dtype. All equal the reference: decoding bit for bit,
products of integers (`slimtune.kernels.int8`) and the cost of walks within float rounding.

On a CPU the loops of `slimtune.kernels.compiled` run where there is a compiler; without one it is a choice by dtype. On
a GPU plain torch runs, or with `SLIMTUNE_TRITON=1` the kernels of `slimtune.kernels.triton`; where that is asked for
and Triton is missing, it is an error and not a slower run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from slimtune.errors import BackendMissing
from slimtune.kernels import compiled, int8
from slimtune.kernels.cpu import TABLED, has_zeros, unpack_half
from slimtune.kernels.reference import apply_grid_
from slimtune.kernels.reference import dequantize_codebook as reference_codebook
from slimtune.linalg import hadamard, lattice, trellis
from slimtune.linalg.packing import pack, unpack

WANTED = "SLIMTUNE_TRITON"
"""The environment variable that turns Triton's kernels on, by `1`."""


def triton_runs(device: torch.device) -> bool:
    """Whether Triton's kernels do the work on `device`. Raises `BackendMissing` where they should and are missing.

    Under `TRITON_INTERPRET=1` Triton interprets them on the CPU: for tests.
    """
    if os.environ.get(WANTED) != "1" or (device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"):
        return False
    if importlib.util.find_spec("triton") is None:
        raise BackendMissing("Triton is not installed", where=WANTED, remedy=f"pip install triton, or unset {WANTED}")
    return True


def unpack_as(codes: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
    """The codes as fresh floats, `dtype [rows, length]`, of a tensor that `slimtune.linalg.packing.pack` made."""
    if _tabled(codes, bits, dtype):
        return unpack_half(codes, bits, length, dtype)
    return unpack(codes, bits, length).to(dtype)


def _tabled(codes: Tensor, bits: int, dtype: torch.dtype) -> bool:
    """Whether codes are looked up."""
    half = dtype in (torch.bfloat16, torch.float16)
    return codes.device.type == "cpu" and half and bits in TABLED and not torch.compiler.is_compiling()


def dequantize_affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    work: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """`W[o, i] = (q[o, i] - zero[o, g]) * scale[o, g]`, computed in `work`: `dtype [out, in_features]`.

    `codes` is packed, `scale` and `zero` are `[out, groups]`, `None` meaning `2**(bits - 1)` everywhere.
    """
    if dtype != torch.float64 and triton_runs(codes.device):
        from slimtune.kernels import triton

        return triton.dequantize_affine(
            codes, scale, zero, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype
        )
    if dtype in (torch.float32, torch.bfloat16) and compiled.fits(codes, scale, zero):
        return compiled.decode_affine(
            codes, scale, zero, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype
        )
    if _tabled(codes, bits, work) and scale.shape[1] * group_size == in_features:
        middle = 2 ** (bits - 1) if zero is None else zero
        if isinstance(middle, int) or has_zeros(middle, bits, group_size, in_features):
            less = unpack_half(codes, bits, in_features, work, middle)
            less.unflatten(1, (scale.shape[1], group_size)).mul_(scale.to(work).unsqueeze(-1))
            return less.to(dtype)
    q = unpack_as(codes, bits, in_features, work)
    return apply_grid_(q, scale, zero, bits=bits, group_size=group_size).to(dtype)


def dequantize_codebook(
    codes: Tensor,
    scale: Tensor,
    *,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`W[o, i] = levels[q[o, i]] * scale[o, g]`, computed in the dtype of `scale`: `dtype [out, in_features]`."""
    kernel = reference_codebook
    known = dtype in (torch.float32, torch.bfloat16) and scale.dtype in (torch.float32, dtype)
    if known and compiled.fits(codes, scale):
        kernel = compiled.decode_codebook
    return kernel(codes, scale, levels=levels, group_size=group_size, in_features=in_features, dtype=dtype)


def affine_product(
    x: Tensor, *, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """`x Wᵀ` with the affine weight left packed, for a few rows, where `triton_runs`: `[..., in]` to `[..., out]`."""
    from slimtune.kernels import triton

    rows = x.reshape(-1, x.shape[-1])
    return triton.affine_product(rows, codes, scale, zero, bits=bits, group_size=group_size).view(
        *x.shape[:-1], len(codes)
    )


def round_tokens(x: Tensor, bits: int, grid: int8.Gridder, *, symmetric: bool) -> int8.Tokens:
    """The tokens `x` (float `[n, in]`) on their grids, as the product on their device wants them."""
    if triton_runs(x.device):
        from slimtune.kernels import triton

        return int8.Tokens(*triton.round_tokens(x, bits, grid, symmetric=symmetric))
    return int8.round_tokens(x, bits, grid, symmetric=symmetric)


def integer_product(
    tokens: int8.Tokens, *, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """`x Wᵀ` in integers, where `triton_runs`: of rounded tokens and a packed weight with one scale a row."""
    from slimtune.kernels import triton

    return triton.integer_product(*tokens, codes, scale, zero, bits=bits, dtype=dtype)


def transform(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Every vector along the last dimension of `x` times the transform of its width, in the dtype of `x`."""
    if x.dtype == torch.float64 or torch.compiler.is_compiling() or not triton_runs(x.device):
        return hadamard.transform(x, inverse=inverse)
    return cast(Tensor, _Transform.apply(x, inverse))


class _Transform(torch.autograd.Function):
    """By Triton, where the width has a kernel: orthogonal, so that its gradient goes back by the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: bool) -> Tensor:
        from slimtune.kernels import triton

        ctx.inverse = inverse
        found = triton.transform(x.reshape(-1, x.shape[-1]), inverse=inverse)
        return hadamard.transform(x, inverse=inverse) if found is None else found.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return transform(gradients[0], inverse=not ctx.inverse), None


def decode_lattice(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Lattice points: codes uint8 `[..., bits]` to `dtype [..., 8]`."""
    if triton_runs(codes.device):
        from slimtune.kernels import triton

        bits = codes.shape[-1]
        found = triton.decode_lattice(codes.reshape(-1, bits), *lattice.tables(bits, dtype, codes.device))
        return found.view(*codes.shape[:-1], lattice.WIDTH)
    if dtype == torch.float32 and compiled.fits(codes):
        return compiled.decode_lattice(codes, codes.shape[-1])
    return lattice.decode(codes, dtype)


def decode_trellis(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Closed walks: codes uint8 `[n, 32 * bits]` to `dtype [n, 256]`."""
    if triton_runs(codes.device):
        from slimtune.kernels import triton

        return triton.decode_trellis(codes, trellis.numbers(bits, dtype, codes.device), bits)
    return trellis.decode(codes, bits, dtype)


def decode_tiles(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Walks that are tiles, row by row: uint8 `[down, across * 32 * bits]` to `dtype [16 down, 16 across]`."""
    if dtype == torch.float32 and not triton_runs(codes.device) and compiled.fits(codes):
        return compiled.decode_tiles(codes, trellis.numbers(bits, dtype, codes.device), bits)
    tiles = decode_trellis(codes.reshape(-1, 32 * bits), bits, dtype).view(len(codes), -1, 16, 16)
    return tiles.transpose(1, 2).reshape(16 * len(codes), -1)


def encode_trellis(x: Tensor, encoder: trellis.Encoder) -> Tensor:
    """Codes, uint8 `[n, 32 * bits]`, of normal numbers of variance 1, `[n, 256]`.

    The loop in C finds a walk as near as `encoder` does, and another one only where two are equally near.
    """
    if x.dtype == torch.float32 and compiled.fits(x):
        bits = encoder.bits
        numbers = trellis.table(bits).to(torch.float32)
        return pack(compiled.encode_trellis(x * trellis.SPREAD[bits], numbers, bits), bits)
    return encoder(x)


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
    """Whether a product with `x`, rounded to at most 8 bits, runs in integers: in inference, by Triton's kernels or on
    a CPU with units for it. A graph is captured, and a gradient taken, of the reference."""
    return (
        _no_reference()
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (triton_runs(x.device) or (x.device.type == "cpu" and int8.fast()))
    )


def float8_wanted(x: Tensor) -> bool:
    """Whether a product with `x`, rounded to float8, runs in it: in inference, in bfloat16, on an NVIDIA GPU of
    compute capability 8.9 or more."""
    there = x.device.type == "cuda" and torch.version.cuda is not None and x.dtype == torch.bfloat16
    return there and _no_reference() and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _no_reference() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _references[-1])
