"""On a CPU: codes become half-precision values a byte or two at a time, by looking them up; or are multiplied packed.

A table has an entry for every byte (every 12 bits where codes have three), as wide as the codes in it times 16 bits;
one gather makes two or four values, zero points taken off. Measured on one core, 1536 x 576 to bfloat16, against the
reference: 2 to 3 times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.linalg.packing import row_bytes

TABLED = (2, 3, 4)
"""Widths of codes that have a table."""


@cache
def _table(bits: int, dtype: torch.dtype) -> Tensor:
    """`[zero points, 2**n]` integers, each the memory of the `n / bits` values that its index's bits stand for, less a
    zero point."""
    index = torch.arange(4096 if bits == 3 else 256)
    places = 4 if bits == 3 else 8 // bits
    values = torch.stack([(index >> (bits * place)) & (2**bits - 1) for place in range(places)], 1)
    values = values - torch.arange(2**bits + 1).view(-1, 1, 1)
    return values.to(dtype).view(torch.int32 if places == 2 else torch.int64).squeeze(-1)


def unpack_half(codes: Tensor, bits: int, length: int, dtype: torch.dtype, zero: Tensor | int = 0) -> Tensor:
    """The codes less their zero points, `dtype [rows, length]`, bfloat16 or float16.

    `codes` is packed, uint8 `[rows, bytes]`, on a CPU; `zero` is one number, or uint8 `[rows, groups]` for groups that
    fill a row. Raises `ValueError` where the look-up does not know them (`has_zeros` tells).
    """
    rows, table = len(codes), _table(bits, dtype)
    index = codes
    if bits == 3:  # three bytes are two look-ups
        words = pad(pad(codes, (0, -codes.shape[1] % 3)).view(-1, 3), (0, 1)).view(torch.int32)
        index = torch.cat([words & 4095, words >> 12], 1).view(rows, -1)
    if isinstance(zero, int):
        index = index.to(torch.int32) + zero * table.shape[1]
    else:
        offsets = zero.to(torch.int32).mul_(table.shape[1]).unsqueeze(-1)
        index = index.unflatten(1, (zero.shape[1], -1)) + offsets
    values = table.view(-1).index_select(0, index.view(-1)).view(dtype).view(rows, -1)
    return values if values.shape[1] == length else values[:, :length].contiguous()


def has_zeros(zero: Tensor, bits: int, group_size: int, length: int) -> bool:
    """Whether `unpack_half` takes these zero points: no look-up is of two groups, and none is beyond the grid."""
    whole = zero.shape[1] * group_size == length and group_size % (2 if bits == 4 else 8) == 0
    whole = whole and 8 * row_bytes(length, bits) == bits * length
    return whole and zero.dtype == torch.uint8 and int(zero.max()) <= 2**bits


GROUPS = (256, 128, 64, 32)
"""Sizes of groups that PyTorch's int4 product knows."""


@dataclass(frozen=True)
class Int4Weight:
    """A weight as PyTorch's int4 product for CPUs wants it: 4-bit codes, bfloat16 scales and offsets of each group.

    For a few rows of `x` the product reads a quarter of the bytes that a bfloat16 weight has. Measured on one core, one
    row: 56 µs for 1536 x 576 (115 in bfloat16, 1,040 when decoding first), 0.9 ms for 8192 x 2048 (2.1; 56). From about
    40 rows on decoding first is faster (`benchmarks/small_products.py`).
    """

    packed: Tensor
    scales: Tensor
    group_size: int

    def __call__(self, x: Tensor) -> Tensor:
        """`x Wᵀ` in the dtype of `x`, computed from bfloat16 inputs: `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.scales)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def int4_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Int4Weight | None:
    """`W = (q - zero) * scale` for that product, or `None` where it does not take the width or the groups.

    Args:
        codes: unpacked, `[out, in]`, of at most 4 bits.
        scale: `[out, groups]`.
        zero: `[out, groups]`, or `None` for `2**(bits - 1)`.
        bits: width of a code.
        group_size: input features that share a scale.
    """
    (out, features), groups = codes.shape, scale.shape[1]
    fitting = next((g for g in GROUPS if group_size % g == 0), 0)
    if bits > 4 or out % 16 or not fitting or groups * group_size != features or codes.device.type != "cpu":
        return None
    middle = 2 ** (bits - 1)  # the product takes 8 from a code: what is added to a weight then stays small, and exact
    offset = (middle - (middle if zero is None else zero.float())) * scale.float()
    scales = torch.stack([scale.float(), offset], -1).repeat_interleave(group_size // fitting, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + (8 - middle), 1)
    return Int4Weight(packed, scales.transpose(0, 1).to(torch.bfloat16).contiguous(), fitting)
