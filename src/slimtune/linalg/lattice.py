"""E8P: 65,536 points of a shifted E8 lattice as a codebook for eight weights at a time, 2 bits each.

The points are `t ± 1/4` where `t` has half-odd coordinates and an even sum. Their magnitudes come from 256 rows: all
227 with coordinates in {1/2, 3/2, 5/2} and a squared norm of at most 10, and the first 29 of the 56 with squared norm
12. The even sum leaves seven signs free; the last follows. Source: QuIP# (arXiv 2402.04396), section 4; any 29 rows
serve.

A code is `row | signs of coordinates 0 to 6 << 8 | shift << 15`, where a sign bit of 1 means negative and a shift bit
of 1 means `-1/4`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

WIDTH = 8
"""Coordinates of a point."""
CHUNK = 512
"""Vectors encoded together: their costs against all rows stay in a cache."""
RESIDUAL = 3.8
"""What the rest is multiplied by before it is encoded again, at 4 bits: the best of 2.8 to 4.2 on normal data."""


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """The 256 rows of magnitudes, float64 `[256, 8]`.

    >>> magnitudes().square().sum(1).to(torch.int64).bincount().tolist()
    [0, 0, 1, 0, 8, 0, 28, 0, 64, 0, 126, 0, 29]
    """
    rows = [(sum(t * t for t in row), row) for row in product((0.5, 1.5, 2.5), repeat=WIDTH)]
    short = sorted((norm, row) for norm, row in rows if norm <= 10 or (norm == 12 and max(row) < 2))
    return torch.tensor([row for _, row in short[:256]], dtype=torch.float64, device="cpu")


@lru_cache(maxsize=8)
def points(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The point of every code, `[65536, 8]`; quarters are exact in any float dtype."""
    with torch.inference_mode(False):
        code = torch.arange(1 << 16, device="cpu")
        t = magnitudes()[code & 255]
        bits = (code[:, None] >> torch.arange(8, 15, device="cpu")) & 1
        last = (bits.sum(1, keepdim=True) + t.sum(1, keepdim=True).long()) & 1
        signs = 1 - 2 * torch.cat([bits, last], 1)
        shift = 0.25 - 0.5 * (code >> 15)[:, None]
        return (t * signs + shift).to(device=device, dtype=dtype)


def nearest(x: Tensor) -> Tensor:
    """The code of the point nearest to each vector: `x` is `[n, 8]`, the result int32 `[n]`.

    Exact: the signs of `x` less the shift are the best ones for every row of magnitudes, and where they make the sum
    odd, the cheapest flip is that of the least `t_i |y_i|`. So 2 × 256 costs a vector stand for all 65,536.

    >>> x = points()[::997]
    >>> bool((nearest(x) == torch.arange(0, 65536, 997)).all())
    True
    """
    return torch.cat([_nearest(part) for part in x.split(CHUNK)]) if len(x) else x.new_empty(0, dtype=torch.int32)


def _nearest(x: Tensor) -> Tensor:
    t, norms, odd = _table(x.dtype, x.device)
    costs, codes = [], []
    for shift in (0, 1):
        y = x.T - (0.25 - 0.5 * shift)
        a, negative = y.abs(), y < 0
        flip = odd[:, None] ^ (negative.sum(0) & 1).bool()
        least = t[:, :1] * a[0]
        other = torch.empty_like(least)
        for i in range(1, WIDTH):
            torch.minimum(least, torch.mul(t[:, i : i + 1], a[i], out=other), out=least)
        cost = torch.addmm(norms[:, None], t, a, alpha=-2, out=other).addcmul_(least, flip, value=4)
        best, row = cost.min(0)
        cheapest = (t[row].T * a).argmin(0)
        turned = flip[row, torch.arange(len(row), device=row.device)]
        signs = negative.int()
        signs ^= (torch.arange(WIDTH, device=x.device)[:, None] == cheapest) & turned
        bits = (signs[:7] << torch.arange(8, 15, device=x.device)[:, None]).sum(0)
        # The costs leave out |y|², which is not the same for both shifts.
        costs.append(best + y.square().sum(0))
        codes.append(row | bits | shift << 15)
    return torch.where(costs[1] < costs[0], codes[1], codes[0]).to(torch.int32)


@lru_cache(maxsize=8)
def _table(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes, their squared norms, and whether an odd number of signs makes the sum even."""
    with torch.inference_mode(False):
        t = magnitudes()
        odd = (t.sum(1).long() & 1).bool()
        return t.to(device, dtype), t.square().sum(1).to(device, dtype), odd.to(device)


def encode(x: Tensor, bits: int) -> Tensor:
    """Codes of vectors `[n, 8]` at 2 bits a coordinate (one point) or 4 (a point, and one for `RESIDUAL` times what is
    left), int32 `[n, bits / 2]`."""
    first = nearest(x)
    if bits == 2:
        return first[:, None]
    rest = (x - points(x.dtype, x.device)[first]) * RESIDUAL
    return torch.stack([first, nearest(rest)], 1)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What `encode` stands for: `codes` is `[..., stages]`, the result `dtype [..., 8]`."""
    table = points(dtype, codes.device)
    first = table[codes[..., 0]]
    return first if codes.shape[-1] == 1 else first + table[codes[..., 1]] / RESIDUAL
