"""Eight numbers at a time, rounded to points of the lattice E8: 2, 3 or 4 bits a number.

E8P has 65,536 points `t ± 1/4`, where `t` has half-odd coordinates and an even sum. Their magnitudes are 256 rows:
all 227 with coordinates in {1/2, 3/2, 5/2} and a squared norm of at most 10, and 29 of the 56 with squared norm 12.
The even sum leaves seven signs free; the last follows. Source: QuIP# (arXiv 2402.04396), section 4; any 29 rows serve.
A code is `row | signs of coordinates 0 to 6 << 8 | shift << 15`; a sign bit of 1 means negative, a shift of 1 `-1/4`.

At 4 bits a second code of E8P stands for what the first one leaves, magnified; at 3 bits it is one of 256 short vectors
of E8: zero, the 240 roots, and 15 of the 16 vectors `±2e`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from slimtune.linalg.constant import constant

WIDTH = 8
"""Coordinates of a point."""

SPREAD = {2: 1.04, 3: 0.99, 4: 0.89}
"""What normal numbers of variance 1 are multiplied by before they are encoded, by bits: the values of least mean
squared error on 2^17 random vectors, in steps of 0.01, for 3 and 4 bits searched together with `RESIDUAL`."""

RESIDUAL = {3: 2.04, 4: 3.85}
"""What the rest is multiplied by before it is encoded again, in steps of 0.02 and 0.05."""

EVEN, REGULAR = 107, 227
"""Rows of even sum, and rows that come with all their permutations: the first so many."""

CHUNK = 1024
"""Vectors encoded together: their costs against all rows stay in a cache."""


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """The 256 rows of magnitudes, float64 `[256, 8]`: rows of even sum first, the 29 of squared norm 12 last.

    >>> magnitudes().square().sum(1).long().bincount().tolist()
    [0, 0, 1, 0, 8, 0, 28, 0, 64, 0, 126, 0, 29]
    """
    rows = [row for row in product((0.5, 1.5, 2.5), repeat=WIDTH) if sum(t * t for t in row) <= 10]
    rows.sort(key=lambda row: (sum(row) % 2, row))
    longer = [tuple(0.5 if i in low else 1.5 for i in range(WIDTH)) for low in combinations(range(WIDTH), 3)]
    return torch.tensor(rows + longer[: 256 - len(rows)], dtype=torch.float64, device="cpu")


@lru_cache(maxsize=16)
def points(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The E8P point of every code, `[65536, 8]`; quarters are exact in any float dtype."""
    with torch.inference_mode(False):
        code = torch.arange(1 << 16, device="cpu")
        t = magnitudes()[code & 255]
        bits = (code[:, None] >> torch.arange(8, 15, device="cpu")) & 1
        last = (bits.sum(1, keepdim=True) + t.sum(1, keepdim=True).long()) & 1
        shift = 0.25 - 0.5 * (code >> 15)[:, None]
        return (t * (1 - 2 * torch.cat([bits, last], 1)) + shift).to(device=device, dtype=dtype)


@lru_cache(maxsize=16)
def roots(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """256 short vectors of E8, `[256, 8]`: zero, the 240 of squared norm 2, and `±2e` without the last.

    >>> roots().square().sum(1).long().bincount().tolist()
    [1, 0, 240, 0, 15]
    """
    with torch.inference_mode(False):
        one = torch.eye(WIDTH, dtype=torch.float64, device="cpu")
        pairs = [a * one[i] + b * one[j] for i, j in combinations(range(WIDTH), 2) for a in (1, -1) for b in (1, -1)]
        halves = torch.tensor(list(product((0.5, -0.5), repeat=WIDTH)), dtype=torch.float64, device="cpu")
        halves = halves[halves.sum(1).long() % 2 == 0]
        made = torch.cat([0 * one[:1], torch.stack(pairs), halves, 2 * one, -2 * one[:-1]])
        return made.to(device=device, dtype=dtype)


def nearest(x: Tensor) -> Tensor:
    """The code of the E8P point nearest to each vector: `x` is `[n, 8]`, the result int64 `[n]`.

    Exact, with the costs of 2 x 256 rows for all 65,536 points. For `y = x ∓ 1/4` a row `t` costs `|t|² - 2 t·|y|`,
    and where the signs of `y` would make the sum odd, `4 min t_i |y_i|` for the cheapest flip. All but the last 29 rows
    come with every permutation of theirs, and each has a coordinate 1/2: the best permutation has it where `|y|` is
    least, so `2 min |y_i|` may stand for the flip of any of them.
    """
    return _chunked(_nearest, x)


def encode(x: Tensor, bits: int) -> Tensor:
    """Codes of vectors of normal numbers of variance 1: `x` is `[n, 8]`, the result uint8 `[n, bits]`.

    Bytes 0 and 1 are the code of E8P, the low one first; at 4 bits, bytes 2 and 3 are that of the magnified rest, and
    at 3 bits byte 2 is the rest's among `roots`.
    """
    x = x * SPREAD[bits]
    code = nearest(x)
    stages = [code & 255, code >> 8]
    if bits > 2:
        rest = (x - points(x.dtype, x.device)[code]) * RESIDUAL[bits]
        code = _chunked(_nearest_root, rest) if bits == 3 else nearest(rest)
        stages += [code] if bits == 3 else [code & 255, code >> 8]
    return torch.stack(stages, 1).to(torch.uint8)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What `encode` stands for: `codes` is uint8 `[..., bits]`, the result `dtype [..., 8]`.

    >>> x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> [round(float((decode(encode(x, bits), x.dtype) - x).square().mean()), 2) for bits in (2, 3, 4)]
    [0.09, 0.03, 0.01]
    """
    bits = codes.shape[-1]
    flat = codes.to(torch.int32).reshape(-1, bits)
    first, second = tables(bits, dtype, codes.device)
    found = first.index_select(0, flat[:, 0] | flat[:, 1] << 8)
    if bits > 2:
        found += second.index_select(0, flat[:, 2] if bits == 3 else flat[:, 2] | flat[:, 3] << 8)
    return found.view(*codes.shape[:-1], WIDTH)


@constant
def tables(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the first two bytes of a code stand for, `[65536, 8]`, and what is added for the others (2 bits: nothing,
    the table is empty)."""
    with torch.inference_mode(False):
        first = points(torch.float64, "cpu") / SPREAD[bits]
        second = {2: first[:0], 3: roots() / SPREAD[3], 4: first}[bits] / RESIDUAL.get(bits, 1)
        return first.to(device=device, dtype=dtype), second.to(device=device, dtype=dtype)


@lru_cache(maxsize=4)
def compact(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in few kilobytes, float32 on a CPU: coordinates of all rows with a shift of 1/4, then of -1/4 (`[2, 256,
    8]`), of positive sign (a negative one turns round that of the other shift); what is added, at 4 bits likewise; and
    whether the sum of a row is odd, uint8 `[256]`."""
    with torch.inference_mode(False):
        t = magnitudes()
        first = torch.stack([t + 0.25, t - 0.25]) / SPREAD[bits]
        second = first / RESIDUAL[4] if bits == 4 else tables(bits, torch.float32, torch.device("cpu"))[1]
        return first.float(), second.float(), (t.sum(1).long() & 1).to(torch.uint8)


def _chunked(find: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([find(part) for part in x.split(CHUNK)]) if len(x) else x.new_empty(0, dtype=torch.int64)


def _nearest(x: Tensor) -> Tensor:
    t, norms = _rows(x.dtype, x.device)
    columns = torch.arange(len(x), device=x.device)
    costs, codes = [], []
    for shift in (0, 1):
        y = x - (0.25 - 0.5 * shift)
        a, negative = y.abs(), y < 0
        odd = (negative.sum(1) & 1).bool()
        cost = torch.addmm(norms, a, t.T, alpha=-2)
        least = a[:, :1] * t[REGULAR:, 0]
        for i in range(1, WIDTH):
            least = torch.minimum(least, a[:, i : i + 1] * t[REGULAR:, i])
        cost[:, REGULAR:].addcmul_(least, ~odd[:, None], value=4)
        flip = 2 * a.amin(1)
        groups = [part.min(1) for part in (cost[:, :EVEN], cost[:, EVEN:REGULAR], cost[:, REGULAR:])]
        tried = torch.stack([groups[0][0] + flip * odd, groups[1][0] + flip * ~odd, groups[2][0]])
        best, group = tried.min(0)
        row = torch.stack([groups[0][1], groups[1][1] + EVEN, groups[2][1] + REGULAR])[group, columns]
        cheapest = (t[row] * a).argmin(1)
        negative[columns, cheapest] ^= odd != (group > 0)
        bits = (negative[:, :7].long() << torch.arange(8, 15, device=x.device)).sum(1)
        costs.append(best + y.square().sum(1))  # |y|² is not the same for both shifts
        codes.append(row | bits | shift << 15)
    return torch.where(costs[1] < costs[0], codes[1], codes[0])


def _nearest_root(x: Tensor) -> Tensor:
    table = roots(x.dtype, x.device)
    return torch.addmm(table.square().sum(1), x, table.T, alpha=-2).argmin(1)


@lru_cache(maxsize=16)
def _rows(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        t = magnitudes()
        return t.to(device, dtype), t.square().sum(1).to(device, dtype)
