"""Small integers to bytes and back: one layout for every width.

A row of `n` codes of `bits` bits each is a little-endian bitstream: code `j` occupies the stream's bits
`j * bits ... (j + 1) * bits - 1`. Every row is padded to whole 32-bit words, so that `packed.view(torch.int32)` is the
`weight_packed` of compressed-tensors >= 0.17, and its transpose is the `qweight` of GPTQ, for 2, 3, 4 and 8 bits alike.

Example:
    >>> codes = torch.tensor([[1, 2, 3, 0, 5, 7, 6, 4, 1]], dtype=torch.uint8)
    >>> packed = pack(codes, bits=3)
    >>> packed.shape, packed.dtype
    (torch.Size([1, 4]), torch.uint8)
    >>> torch.equal(unpack(packed, bits=3, length=9), codes)
    True
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.errors import ShapeError

WIDTHS = range(1, 9)
"""The widths a code can have, in bits."""


def row_bytes(length: int, bits: int) -> int:
    """Bytes of a packed row of `length` codes: whole 32-bit words.

    >>> row_bytes(9, 3), row_bytes(64, 4), row_bytes(576, 2)
    (4, 32, 144)
    """
    return -(-length * bits // 32) * 4


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` (uint8 `[rows, length]`, each below `2**bits`) into uint8 `[rows, row_bytes(length, bits)]`.

    Eight codes of `bits` bits fill exactly `bits` bytes, whatever the width; that is the whole algorithm. Raises
    `ShapeError` for a width outside 1..8, a tensor that is not uint8 and 2-D, or a code that does not fit.
    """
    if bits not in WIDTHS:
        raise ShapeError("no such code width", got=f"{bits} bits", wanted="1 to 8 bits")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ShapeError("codes cannot be packed", got=f"{codes.dtype} {list(codes.shape)}", wanted="uint8 [rows, n]")
    if codes.numel() and int(codes.max()) >> bits:
        raise ShapeError("a code does not fit its width", got=int(codes.max()), wanted=f"below {2**bits}")
    rows, length = codes.shape
    width = row_bytes(length, bits)
    groups = -(-width // bits)  # groups of eight codes; the last may be partly padding
    padded = torch.zeros(rows, groups * 8, dtype=torch.int64, device=codes.device)
    padded[:, :length] = codes
    shifts = torch.arange(8, device=codes.device) * bits
    words = (padded.view(rows, groups, 8) << shifts).sum(-1)  # disjoint bits, so the sum is the union
    octets = (words.unsqueeze(-1) >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return octets.to(torch.uint8).view(rows, groups * bits)[:, :width].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The codes, uint8 `[rows, length]`, of a tensor that `pack` made. Runs on `packed`'s device, in few passes."""
    rows = packed.shape[0]
    if packed.shape[1] != row_bytes(length, bits):
        raise ShapeError(
            "packed rows have the wrong size",
            got=f"{packed.shape[1]} bytes",
            wanted=f"{row_bytes(length, bits)} bytes for {length} codes of {bits} bits",
        )
    if bits == 8:
        return packed[:, :length]
    if 8 % bits == 0:  # whole codes in every byte: stay in uint8
        mask = 2**bits - 1
        parts = [(packed >> shift) & mask if shift else packed & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).view(rows, packed.shape[1] * len(parts))[:, :length]
    groups = -(-length // 8)
    octets = packed[:, : groups * bits]
    if octets.shape[1] < groups * bits:
        octets = torch.nn.functional.pad(octets, (0, groups * bits - octets.shape[1]))
    octets = octets.reshape(rows, groups, bits)
    wide = torch.int32 if bits <= 3 else torch.int64
    words = octets[..., 0].to(wide)
    for j in range(1, bits):
        words = words | (octets[..., j].to(wide) << (8 * j))
    shifts = torch.arange(8, device=packed.device, dtype=wide) * bits
    codes: Tensor = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).view(rows, groups * 8)[:, :length]
    return codes


def words(octets: Tensor) -> Tensor:
    """Packed rows, uint8 `[rows, n]`, seen as int32 words `[rows, n / 4]`, as other formats store them."""
    return octets.flatten().view(torch.int32).view(len(octets), -1)  # a single row may have any stride


def octets(words: Tensor) -> Tensor:
    """Rows of int32 words as packed rows: the inverse of `words`."""
    return words.flatten().view(torch.uint8).view(len(words), -1)
