"""Reference kernels in plain torch: correct on every device and in every float dtype, traceable by `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimtune.linalg.packing import unpack


def apply_grid_(codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """`W[o, i] = (q[o, i] - zero[o, g]) * scale[o, g]` with `g = i // group_size`, in the memory of `codes`.

    Args:
        codes: unpacked, `[out, in]`, of the dtype that the arithmetic runs in and the weight is wanted in (whole codes
            and zero points are exact in bfloat16); changed.
        scale: `[out, groups]`, any float dtype.
        zero: `[out, groups]`, integer or float; `None` means `2**(bits - 1)` everywhere (symmetric grids).
        bits: width of a code.
        group_size: input features that share a scale; the last group may be shorter.
    """
    z = 2 ** (bits - 1) if zero is None else zero.to(codes.dtype)
    s = scale.to(codes.dtype)
    (rows, groups), in_features = scale.shape, codes.shape[1]
    if groups * group_size == in_features:
        if zero is not None:
            z = z.unsqueeze(-1)
        return codes.view(rows, groups, group_size).sub_(z).mul_(s.unsqueeze(-1)).view(rows, in_features)
    group = torch.arange(in_features, device=codes.device) // group_size
    return codes.sub_(z if zero is None else z[:, group]).mul_(s[:, group])


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
        scale: `[out, groups]`, of a dtype that holds all levels; the arithmetic runs in it.
        levels: what the codes stand for; a power of two of them.
        group_size: input features that share a scale; the last group may be shorter.
        in_features: columns of the weight.
        dtype: dtype of the result.
    """
    rows, groups = scale.shape
    bits = (len(levels) - 1).bit_length()
    table, index = torch.tensor(levels, dtype=scale.dtype, device=scale.device), codes
    if 8 % bits:
        index = unpack(codes, bits, in_features)
    else:  # one look-up decodes all codes of a byte, the lowest bits first
        table = torch.cartesian_prod(*[table] * (8 // bits)).view(256, -1).flip(1)
        if table.shape[1] * table.element_size() == 8:  # as one word: twice as fast
            table = table.view(torch.int64)
    found = table.index_select(0, index.reshape(-1).to(torch.int32)).view(scale.dtype)
    weight = found.view(rows, -1)[:, :in_features]
    if groups * group_size == in_features:
        weight.unflatten(1, (groups, group_size)).mul_(scale.unsqueeze(-1))
    else:
        weight *= scale.repeat_interleave(group_size, 1)[:, :in_features]
    return weight.to(dtype).contiguous()
