"""Layouts of weights in a rotated basis: `W = diag(sign_out) Hᵀ C H diag(sign_in)`, with `C` read from codes.

`H` is the orthogonal transform of `slimtune.linalg.hadamard`, of the width of the side it is on. `sign_out` carries
the scales of the rows; both signs are bfloat16, for the reason that the scales of `Affine` are, and quantizers fit the
codes to the rounded scales. A row of `C` is a part of every row of the weight, so a slice of the codes is no smaller
weight (`rowwise` is false). Sides that the codes do not divide are padded with zeros *before* they are rotated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.kernels import compiled
from slimtune.kernels.dispatch import decode_lattice, decode_tiles
from slimtune.linalg import lattice
from slimtune.linalg.hadamard import small_factors, transform

PIECE = 1 << 21
"""Numbers of a weight that are turned at once."""

CACHED = 1 << 18
"""The same by the loops: decoded and turned without leaving a core's cache."""

TILE = 16
"""Rows and columns of a tile of trellis codes, which is one sequence."""


@dataclass(frozen=True)
class Lattice:
    """Eight columns of a row are one point of a lattice (E8P), at 3 and 4 bits the sum of two: `bits` bytes.

    Example:
        >>> Lattice(out_features=4, in_features=20, bits=2).tensors()["codes"]
        ((4, 6), torch.uint8)
    """

    tag: ClassVar[str] = "e8p"
    rowwise: ClassVar[bool] = False

    out_features: int
    in_features: int
    bits: int

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        blocks = -(-self.in_features // lattice.WIDTH)
        return {"codes": ((self.out_features, blocks * self.bits), torch.uint8), **_signs(self)}

    @property
    def turned_shape(self) -> tuple[int, int]:
        """Rows and columns of `C`."""
        return self.out_features, _times(self.in_features, lattice.WIDTH)

    def turned(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """`C`, or the part of it that some rows of the codes stand for, a row each: `dtype [rows, columns]`."""
        return decode_lattice(codes.view(len(codes), -1, self.bits), dtype).flatten(1)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`; computed in float32 at least, rounded once."""
        return _turned_back(self, tensors, dtype)


@dataclass(frozen=True)
class Trellis:
    """Sixteen rows and columns are one closed walk through a trellis, `32 * bits` bytes, in the order of its rows.

    Dim 0 of the codes is `ceil(out / 16)`.

    Example:
        >>> Trellis(out_features=20, in_features=64, bits=3).tensors()["codes"]
        ((2, 384), torch.uint8)
    """

    tag: ClassVar[str] = "trellis"
    rowwise: ClassVar[bool] = False

    out_features: int
    in_features: int
    bits: int

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        down, across = -(-self.out_features // TILE), -(-self.in_features // TILE)
        return {"codes": ((down, across * 32 * self.bits), torch.uint8), **_signs(self)}

    @property
    def turned_shape(self) -> tuple[int, int]:
        """Rows and columns of `C`."""
        return _times(self.out_features, TILE), _times(self.in_features, TILE)

    def turned(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """`C`, or the part of it that some rows of the codes stand for, 16 each: `dtype [rows, columns]`."""
        return decode_tiles(codes, self.bits, dtype)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`; computed in float32 at least, rounded once."""
        return _turned_back(self, tensors, dtype)


def turned_pieces(
    layout: Lattice | Trellis, codes: Tensor, dtype: torch.dtype, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """`C`, some rows at a time, about `size` numbers: which, and they, decoded in `wide(dtype)` and rounded."""
    rows, columns = layout.turned_shape
    step = rows // len(codes)
    height = max(1, size // (columns * step))
    for start in range(0, len(codes), height):
        piece = layout.turned(codes[start : start + height], wide(dtype)).to(dtype)
        yield slice(start * step, start * step + len(piece)), piece


def _times(size: int, step: int) -> int:
    """The multiple of `step` that holds `size`."""
    return -(-size // step) * step


def _signs(layout: Lattice | Trellis) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        "sign_out": ((layout.out_features,), torch.bfloat16),
        "sign_in": ((layout.in_features,), torch.bfloat16),
    }


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a weight that is wanted in `dtype` is turned in."""
    return torch.promote_types(dtype, torch.float32)


def _turned_back(layout: Lattice | Trellis, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight. Rows, then columns are turned in pieces: beside the result there is one copy in `wide(dtype)`, and
    not four. Autocast would round the products to half precision."""
    codes, work, (rows, columns) = tensors["codes"], wide(dtype), layout.turned_shape
    out, into = tensors["sign_out"].to(work), tensors["sign_in"].to(work)
    turned = torch.empty(rows, columns, dtype=work, device=out.device)
    if dtype in (torch.float32, torch.bfloat16) and compiled.fits(out, into):
        factors = [factor.T for factor in small_factors(columns)]
        for part, piece in turned_pieces(layout, codes, work, CACHED):
            compiled.turn_rows_(piece, factors)
            turned[part] = piece
        return compiled.turn_columns(turned, [factor.T for factor in small_factors(rows)], out, into, dtype)
    weight = torch.empty(len(out), len(into), dtype=dtype, device=out.device)
    with torch.autocast(out.device.type, enabled=False):
        for part, piece in turned_pieces(layout, codes, work, PIECE):
            turned[part] = transform(piece, inverse=True)
        step = max(PIECE // rows, 1)
        for start in range(0, len(into), step):
            part = slice(start, min(start + step, len(into)))
            plain = transform(turned[:, part], 0, inverse=True)[: len(out)]
            weight[:, part] = plain.mul_(out[:, None]).mul_(into[part])
    return weight
