"""GPU kernels in Triton: packed weights decoded in one pass, and multiplied by a few rows without being written out;
inputs turned by a Hadamard transform in one pass, rounded to at most 8 bits, and multiplied by packed weights in
integers.

Each equals the plain torch it stands for, for odd shapes too: codes less zero points are whole and products with the
scale are rounded once, so weights are equal to the last bit; transforms add up in another order. They are compiled for
GPUs in a test, but have been run by Triton's interpreter only (`TRITON_INTERPRET=1`), not timed on a GPU;
`SLIMTUNE_TRITON=1` turns them on (`slimtune.kernels.dispatch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, reduce
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimtune.linalg.hadamard import factors

ROWS, COLUMNS = 32, 64
"""Rows and columns of a weight that one program decodes."""

TOKENS = 16
"""Rows of an input that one program multiplies: the least that tensor cores take."""

POINTS, WALKS = 256, 4
"""Lattice points, and trellis sequences, that one program decodes."""

VALUES = 1024
"""Values of a token that are looked at together."""

MANY = 64
"""Tokens that one program multiplies in integers, where there are more than `TOKENS`."""

TURNED = 4
"""Vectors that one program turns, one after the other."""

TALLEST = 128
"""The order of the first of a transform's two matrices at most, rounded up to a power of two: vectors are read once for
every `HEIGHT` of its rows."""

SUMS = 2**13
"""Values of a turned vector that one program adds up, in registers."""

SHARED = 2**16
"""Bytes of shared memory below which one program stays: the smallest of GPUs give it no more."""


@triton.jit
def _codes(
    codes: tl.tensor,
    r: tl.tensor,
    c: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The codes at rows `r` and columns `c`, int32; anything outside the weight."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    bit = c * BITS
    at = r[:, None] * row_bytes + (bit // 8)[None, :]
    word = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may end in the next byte
        more = inside & ((bit // 8 + 1) < row_bytes)[None, :]
        word = word | (tl.load(codes + at + 1, mask=more, other=0).to(tl.int32) << 8)
    return (word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def _weights(
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    r: tl.tensor,
    c: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
) -> tl.tensor:
    """`(q - zero) * scale` at rows `r` and columns `c`, float32; anything outside the weight."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    q = _codes(codes, r, c, rows, columns, row_bytes, BITS).to(tl.float32)
    group = r[:, None] * groups + (c // group_size)[None, :]
    s = tl.load(scale + group, mask=inside, other=0).to(tl.float32)
    z = tl.load(zero + group, mask=inside, other=0).to(tl.float32) if HAS_ZERO else 1 << (BITS - 1)
    return (q - z) * s


@triton.jit
def _dequantize(
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = _weights(codes, scale, zero, r, c, rows, columns, row_bytes, groups, group_size, BITS, HAS_ZERO)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(out + r[:, None] * columns + c[None, :], w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, columns, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        w = _weights(codes, scale, zero, r, c, rows, columns, row_bytes, groups, group_size, BITS, HAS_ZERO)
        inside = (t < tokens)[:, None] & (c < columns)[None, :]
        some = tl.load(x + t[:, None] * columns + c[None, :], mask=inside, other=0)
        total = tl.dot(some, tl.trans(w.to(some.dtype)), total, input_precision="ieee")
    inside = (t < tokens)[:, None] & (r < rows)[None, :]
    tl.store(y + t[:, None] * rows + r[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _ends(x: tl.tensor, low: tl.tensor, high: tl.tensor, columns: tl.tensor, VALUES: tl.constexpr) -> None:
    token = tl.program_id(0)
    least, most = tl.zeros((VALUES,), tl.float32), tl.zeros((VALUES,), tl.float32)
    for start in range(0, columns, VALUES):
        c = start + tl.arange(0, VALUES)
        some = tl.load(x + token * columns + c, mask=c < columns, other=0).to(tl.float32)
        least, most = tl.minimum(least, some), tl.maximum(most, some)
    tl.store(low + token, tl.min(least, 0))
    tl.store(high + token, tl.max(most, 0))


@triton.jit
def _round(
    x: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    MIDDLE: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    token, c = tl.program_id(0), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    some = tl.load(x + token * columns + c, mask=c < columns, other=0).to(tl.float32)
    q = tl.div_rn(some, tl.load(scale + token))
    # Half to even: floats this large are whole. What is further out than the clamp may be rounded as it likes.
    q = tl.minimum(tl.maximum(q, -1024.0), 1024.0)
    q = (q + 12582912.0) - 12582912.0 + tl.load(zero + token)
    q = tl.minimum(tl.maximum(q, -MIDDLE), MIDDLE - 1)
    tl.store(out + token * columns + c, q.to(tl.int8), mask=c < columns)


@triton.jit
def _integers(
    tokens: tl.tensor,
    token_scale: tl.tensor,
    token_zero: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    y: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SHIFTED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    z = tl.load(zero + r, mask=r < rows, other=0).to(tl.int32)[:, None] if HAS_ZERO else 1 << (BITS - 1)
    total, sums = tl.zeros((TOKENS, ROWS), tl.int32), tl.zeros((ROWS,), tl.int32)
    for start in range(0, columns, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        w = _codes(codes, r, c, rows, columns, row_bytes, BITS) - z
        w = tl.where((c < columns)[None, :], w, 0)
        inside = (t < count)[:, None] & (c < columns)[None, :]
        some = tl.load(tokens + t[:, None] * columns + c[None, :], mask=inside, other=0)
        total = tl.dot(some, tl.trans(w.to(tl.int8)), total, out_dtype=tl.int32)
        if SHIFTED:
            sums += tl.sum(w, 1)
    found = total.to(tl.float32)
    if SHIFTED:
        shift = tl.load(token_zero + t, mask=t < count, other=0)
        found -= shift[:, None] * sums.to(tl.float32)[None, :]
    s = tl.load(scale + r, mask=r < rows, other=0).to(tl.float32)
    found = found * s[None, :] * tl.load(token_scale + t, mask=t < count, other=0)[:, None]
    inside = (t < count)[:, None] & (r < rows)[None, :]
    tl.store(y + t[:, None] * rows + r[None, :], found.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    x: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    y: tl.tensor,
    count: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    left_scale: tl.tensor,
    right_scale: tl.tensor,
    B: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    TURNED: tl.constexpr,
) -> None:
    i, c = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, B)
    for turn in range(TURNED):
        n = (tl.program_id(0) * TURNED + turn).to(tl.int64)
        at = n * a * b
        found = tl.zeros((HEIGHT, B), tl.float32)
        for begin in range(0, b, INNER):
            j = begin + tl.arange(0, INNER)
            half = tl.zeros((HEIGHT, INNER), tl.float32)
            for start in range(0, a, DEPTH):
                k = start + tl.arange(0, DEPTH)
                first = tl.load(left + i[:, None] * a + k[None, :], mask=(i < a)[:, None] & (k < a)[None, :], other=0)
                inside = ((k < a) & (n + 0 * k < count))[:, None] & (j < b)[None, :]
                half = tl.dot(first, tl.load(x + at + k[:, None] * b + j[None, :], mask=inside, other=0), half, "ieee")
            second = tl.load(right + j[:, None] * b + c[None, :], mask=(j < b)[:, None] & (c < b)[None, :], other=0)
            found = tl.dot((half * left_scale).to(second.dtype), second, found, "ieee")
        inside = ((i < a) & (n + 0 * i < count))[:, None] & (c < b)[None, :]
        tl.store(y + at + i[:, None] * b + c[None, :], (found * right_scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _lattice(
    codes: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    BITS: tl.constexpr,
    POINTS: tl.constexpr,
) -> None:
    n = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    inside, eight = n < count, tl.arange(0, 8)
    low = tl.load(codes + n * BITS, mask=inside, other=0).to(tl.int32)
    high = tl.load(codes + n * BITS + 1, mask=inside, other=0).to(tl.int32)
    point = tl.load(first + (low | high << 8)[:, None] * 8 + eight[None, :])
    if BITS > 2:
        rest = tl.load(codes + n * BITS + 2, mask=inside, other=0).to(tl.int32)
        if BITS == 4:
            rest = rest | tl.load(codes + n * BITS + 3, mask=inside, other=0).to(tl.int32) << 8
        point += tl.load(second + rest[:, None] * 8 + eight[None, :])
    tl.store(out + n[:, None] * 8 + eight[None, :], point, mask=inside[:, None])


@triton.jit
def _trellis(
    codes: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    WALKS: tl.constexpr,
) -> None:
    n = tl.program_id(0) * WALKS + tl.arange(0, WALKS)
    t = tl.arange(0, STEPS)
    inside = (n < count)[:, None] & (t < STEPS)[None, :]
    ring: tl.constexpr = STEPS * BITS // 8  # bytes; a state is 12 bits, hence in three of them at most
    byte = t * BITS // 8
    state = tl.zeros((WALKS, STEPS), tl.int32)
    for i in tl.static_range(3):
        at = n[:, None] * ring + ((byte + i) % ring)[None, :]
        state = state | tl.load(codes + at, mask=inside, other=0).to(tl.int32) << (8 * i)
    state = (state >> (t * BITS % 8)[None, :]) & 4095
    tl.store(out + n[:, None] * STEPS + t[None, :], tl.load(table + state), mask=inside)


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
    """`W[o, i] = (q[o, i] - zero[o, g]) * scale[o, g]`, `dtype [out, in_features]`, computed in float32.

    `codes` is packed, uint8 `[out, bytes]`; `scale` and `zero` are `[out, groups]`, `None` meaning `2**(bits - 1)`.
    """
    rows = len(codes)
    out = torch.empty(rows, in_features, dtype=dtype, device=codes.device)
    sizes = rows, in_features, codes.shape[1], scale.shape[1], group_size
    grid = triton.cdiv(rows, ROWS), triton.cdiv(in_features, COLUMNS)
    _dequantize[grid](codes, scale, scale if zero is None else zero, out, *sizes, bits, zero is not None, ROWS, COLUMNS)
    return out


def affine_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """`x Wᵀ` in the dtype of `x`, added up in float32, for few rows: `[n, in]` to `[n, out]`; else as above."""
    x = x.contiguous()
    (tokens, features), rows = x.shape, len(codes)
    y = x.new_empty(tokens, rows)
    sizes = tokens, rows, features, codes.shape[1], scale.shape[1], group_size
    grid = triton.cdiv(rows, ROWS), triton.cdiv(tokens, TOKENS)
    given = scale if zero is None else zero
    _product[grid](x, codes, scale, given, y, *sizes, bits, zero is not None, TOKENS, ROWS, COLUMNS)
    return y


def round_tokens(
    x: Tensor, bits: int, grid: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens `x` (float `[n, in]`) on their grids, in whole numbers around zero: codes, int8; scales, float32
    `[n, 1]`; and zero points, or None where they are 0. `grid` is given the ends of each token, `[n, 1]`."""
    x, middle = x.contiguous(), 2 ** (bits - 1)
    low, high = (torch.empty(len(x), 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if len(x):
        _ends[(len(x),)](x, low, high, x.shape[1], VALUES)
    scale, zero = grid(low, high)
    shift, codes = (zero - middle).contiguous(), torch.empty_like(x, dtype=torch.int8)
    if len(x):
        _round[(len(x), triton.cdiv(x.shape[1], VALUES))](
            x, scale.contiguous(), shift, codes, x.shape[1], middle, VALUES
        )
    return codes, scale, None if symmetric else shift


def integer_product(
    tokens: Tensor,
    token_scale: Tensor,
    token_zero: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """`x Wᵀ` of what `round_tokens` made and a packed weight with one scale a row (`[out, 1]`), added up in int32."""
    (count, features), rows = tokens.shape, len(codes)
    y = torch.empty(count, rows, dtype=dtype, device=tokens.device)
    sizes = count, rows, features, codes.shape[1]
    together = TOKENS if count <= TOKENS else MANY
    shift = token_scale if token_zero is None else token_zero
    given = scale if zero is None else zero
    kinds = bits, zero is not None, token_zero is not None, together, COLUMNS, COLUMNS
    if count:
        cells = triton.cdiv(rows, COLUMNS), triton.cdiv(count, together)
        _integers[cells](tokens, token_scale, shift, codes, scale, given, y, *sizes, *kinds)
    return y


def transform(x: Tensor, *, inverse: bool) -> Tensor | None:
    """`slimtune.linalg.hadamard.transform` of `x` `[n, width]`, or None where the width has one factor, whose product
    is as fast, or too large ones. Between its two products there is one rounding to the dtype of `x`."""
    sides = _sides(x.shape[1], inverse, x.dtype, x.device)
    if sides is None:
        return None
    a, b = map(len, sides)
    tile = turning_tile(_padded(a), _padded(b))
    assert tile is not None, "`_sides` has asked"
    x = x.contiguous()
    y = torch.empty_like(x)
    if len(x):
        scales = a**-0.5, b**-0.5
        cells = triton.cdiv(len(x), TURNED), triton.cdiv(a, tile.height)
        _turn[cells](x, *sides, y, len(x), a, b, *scales, _padded(b), *tile, TURNED, num_stages=1)
    return y


class Tile(NamedTuple):
    """What one program looks at together when it turns a vector, written as `[a, b]`: `height` rows of the result, and
    of the vector `depth` rows and `inner` columns."""

    height: int
    depth: int
    inner: int

    def shared_bytes(self, b: int) -> int:
        """Shared memory that a program takes at most: both operands of both products (`b`: the width of the result),
        four bytes a value, since GPUs without units for a shorter dtype widen it, and one stage of each."""
        first = self.height * self.depth + self.depth * self.inner
        return 4 * (first + self.height * self.inner + self.inner * b)


def turning_tile(a: int, b: int) -> Tile | None:
    """The largest tile for a transform with matrices of (padded) orders `a` and `b` that takes less than `SHARED`;
    None where none does.

    >>> turning_tile(64, 512), turning_tile(64, 512).shared_bytes(512)
    (Tile(height=16, depth=64, inner=16), 41984)
    >>> turning_tile(64, 1024)
    """
    height = min(a, max(16, SUMS // b))
    for inner, depth in product((64, 32, 16), repeat=2):
        tile = Tile(height, min(depth, a), min(inner, b))
        if tile.shared_bytes(b) < SHARED:
            return tile
    return None


def _padded(order: int) -> int:
    return max(16, triton.next_power_of_2(order))


@lru_cache(maxsize=64)
def _sides(n: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The factors of a transform as two matrices with `M Mᵀ = order * I`, hence most often of ±1: `L X R` is the
    transform of a vector written as `X`."""
    with torch.inference_mode(False):
        made = [factor * math.sqrt(len(factor)) for factor in factors(n)]
        ways = []
        for cut in range(1, len(made)):
            left, right = reduce(torch.kron, made[:cut]), reduce(torch.kron, made[cut:])
            a, b = (_padded(len(side)) for side in (left, right))
            if a <= TALLEST and turning_tile(a, b) is not None:
                ways.append((left, right))
        if not ways:
            return None
        left, right = min(ways, key=lambda pair: max(_padded(len(side)) for side in pair))
        left, right = (left.T, right) if inverse else (left, right.T)
        return left.to(device, dtype).contiguous(), right.to(device, dtype).contiguous()


def decode_lattice(codes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`first[c] + second[d]` for codes uint8 `[n, bits]`: `c` is bytes 0 and 1, `d` what follows, if any; `[n, 8]`."""
    codes = codes.contiguous()
    out = torch.empty(len(codes), 8, dtype=first.dtype, device=codes.device)
    _lattice[(triton.cdiv(len(codes), POINTS),)](codes, first, second, out, len(codes), codes.shape[1], POINTS)
    return out


def decode_trellis(codes: Tensor, table: Tensor, bits: int) -> Tensor:
    """`table[state]` of every step of closed walks: codes uint8 `[n, 32 * bits]` to `[n, 256]`."""
    codes, steps = codes.contiguous(), 8 * codes.shape[1] // bits
    out = torch.empty(len(codes), steps, dtype=table.dtype, device=codes.device)
    _trellis[(triton.cdiv(len(codes), WALKS),)](codes, table, out, len(codes), bits, steps, WALKS)
    return out
