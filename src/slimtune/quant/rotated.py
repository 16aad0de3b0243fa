"""Layouts of weights in a rotated basis: `W = diag(sign_out) Hᵀ C H diag(sign_in)`, with `C` read from codes.

`H` is the orthogonal transform of `slimtune.linalg.hadamard`, of the width of the side it is on. `sign_out` carries
the scales of the rows; both signs are bfloat16, for the reason that the scales of `Affine` are, and quantizers fit the
codes to the rounded scales. A row of `C` is a part of every row of the weight, so a slice of the codes is no smaller
weight (`rowwise` is false). Sides that the codes do not divide are padded with zeros *before* they are rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.kernels import compiled
from slimtune.kernels.dispatch import decode_lattice, decode_trellis
from slimtune.linalg import lattice
from slimtune.linalg.hadamard import small_factors, transform

PIECE = 1 << 21
"""Numbers of a weight that are turned at once."""

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

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`; computed in float32 at least, rounded once."""
        codes = tensors["codes"].view(self.out_features, -1, self.bits)

        def rows(part: slice) -> Tensor:
            return decode_lattice(codes[part], _wide(dtype)).flatten(1)

        return _turned_back(rows, 1, codes.shape[0], codes.shape[1] * lattice.WIDTH, tensors, dtype)


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

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`; computed in float32 at least, rounded once."""
        codes = tensors["codes"]
        across = codes.shape[1] // (32 * self.bits)

        def rows(part: slice) -> Tensor:
            some = codes[part.start // TILE : part.stop // TILE]
            tiles = decode_trellis(some.reshape(-1, 32 * self.bits), self.bits, _wide(dtype))
            return tiles.view(len(some), across, TILE, TILE).transpose(1, 2).reshape(len(some) * TILE, -1)

        return _turned_back(rows, TILE, len(codes) * TILE, across * TILE, tensors, dtype)


def _signs(layout: Lattice | Trellis) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        "sign_out": ((layout.out_features,), torch.bfloat16),
        "sign_in": ((layout.in_features,), torch.bfloat16),
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _turned_back(
    decode: Callable[[slice], Tensor],
    step: int,
    rows: int,
    columns: int,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The weight of a rotated one, `[rows, columns]`, of which `decode` makes some rows, whole multiples of `step`.

    Rows, then columns are turned in pieces: beside the result there is one copy in `_wide(dtype)`, and not four.
    Autocast would round the products to half precision.
    """
    wide = _wide(dtype)
    out, into = tensors["sign_out"].to(wide), tensors["sign_in"].to(wide)
    parts = _parts(rows, max(PIECE // columns // step, 1) * step)
    if dtype in (torch.float32, torch.bfloat16) and compiled.fits(out, into):
        turned = decode(parts[0]) if len(parts) == 1 else torch.empty(rows, columns, dtype=wide, device="cpu")
        for part in parts[len(parts) == 1 :]:
            turned[part] = decode(part)
        compiled.turn_rows_(turned, [factor.T for factor in small_factors(columns)])
        return compiled.turn_columns(turned, [factor.T for factor in small_factors(rows)], out, into, dtype)
    turned = torch.empty(rows, columns, dtype=wide, device=out.device)
    weight = torch.empty(len(out), len(into), dtype=dtype, device=out.device)
    with torch.autocast(out.device.type, enabled=False):
        for part in parts:
            turned[part] = transform(decode(part), inverse=True)
        for part in _parts(len(into), max(PIECE // rows, 1)):
            plain = transform(turned[:, part], 0, inverse=True)[: len(out)]
            weight[:, part] = plain.mul_(out[:, None]).mul_(into[part])
    return weight


def _parts(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
