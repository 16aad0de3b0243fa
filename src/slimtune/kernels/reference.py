"""Reference kernels in plain torch: correct on every device and in every float dtype, traceable by `torch.compile`."""

from __future__ import annotations

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
        dtype: dtype of the result; the arithmetic runs in it (codes and zero points are exact in bfloat16).
    """
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
