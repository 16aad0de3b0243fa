"""Reference kernels in plain torch: correct on every device and in every float dtype, traceable by `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimtune.linalg.packing import unpack


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
    """`W[o, i] = (q[o, i] - zero[o, g]) * scale[o, g]` with `g = i // group_size`, as `dtype [out, in_features]`.

    Args:
        codes: packed codes, uint8 `[out, row_bytes(in_features, bits)]`.
        scale: `[out, groups]`, any float dtype.
        zero: `[out, groups]`, integer or float; `None` means `2**(bits - 1)` everywhere (symmetric grids).
        bits: width of a code.
        group_size: input features that share a scale; the last group may be shorter.
        in_features: columns of the weight.
        dtype: dtype of the result; the arithmetic runs in it where codes less zero points are whole numbers, which are
            exact in bfloat16, and else in float32 at least, so that there is one rounding.
    """
    if zero is not None and zero.is_floating_point() and dtype.itemsize < 4:
        exact = dequantize_affine(
            codes, scale, zero, bits=bits, group_size=group_size, in_features=in_features, dtype=torch.float32
        )
        return exact.to(dtype)
    q = unpack(codes, bits, in_features).to(dtype)
    return scaled(q, scale, zero, bits, group_size)


def scaled(q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """`(q - zero) * scale` group by group, in the memory and the dtype of `q` (`[out, in]`)."""
    dtype, in_features = q.dtype, q.shape[1]
    z = 2 ** (bits - 1) if zero is None else zero.to(dtype)
    s = scale.to(dtype)
    rows, groups = scale.shape
    if groups * group_size == in_features:
        if zero is not None:
            z = z.unsqueeze(-1)
        return q.view(rows, groups, group_size).sub_(z).mul_(s.unsqueeze(-1)).view(rows, in_features)
    group = torch.arange(in_features, device=q.device) // group_size
    return q.sub_(z if zero is None else z[:, group]).mul_(s[:, group])


def dequantize_codebook(
    codes: Tensor,
    scale: Tensor,
    *,
    levels: Sequence[float],
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`W[o, i] = levels[q[o, i]] * scale[o, i // group_size]`, as `dtype [out, in_features]`, rounded once.

    Args:
        codes: packed codes, uint8 `[out, row_bytes(in_features, bits)]`, where there are `2**bits` levels.
        scale: `[out, groups]`, float32 or float64; the arithmetic runs in its dtype.
        levels: what the codes stand for.
        group_size: input features that share a scale; the last group may be shorter.
        in_features: columns of the weight.
        dtype: dtype of the result.
    """
    rows, groups = scale.shape
    bits = (len(levels) - 1).bit_length()
    table = torch.tensor(levels, dtype=scale.dtype, device=scale.device)
    q = unpack(codes, bits, in_features)
    unit = table.index_select(0, q.reshape(-1).to(torch.int32)).view(rows, in_features)
    if groups * group_size == in_features:
        return (unit.view(rows, groups, group_size) * scale.unsqueeze(-1)).to(dtype).view(rows, in_features)
    group = torch.arange(in_features, device=q.device) // group_size
    return (unit * scale[:, group]).to(dtype)
