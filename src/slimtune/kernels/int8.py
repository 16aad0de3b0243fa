"""Products of whole numbers: a linear whose weight and input are both in at most 8 bits.

`y[t, o] = s[t] * v[o] * sum_i (q[t, i] - z[t]) * c[o, i]` with the codes `q` of a token, its scale `s` and zero point
`z`, and the codes `c` of an output with its scale `v`. The sum is exact in int32; what is rounded is its scaling, in
float32, and the result, once, to the dtype of the input. The codes are those of the reference to the last one, since
the grid is the caller's and values are divided by their scale, not multiplied by its inverse.

oneDNN's int8 linear multiplies; its weight is packed for the processor once, takes a byte a weight, and is kept as long
as its codes live. Signed inputs would run in it on processors with AMX, but nowhere else in anything but a slow
reference: 1.2 s for what takes 2 ms, so codes of tokens are unsigned, around 128. Measured on one core, 512 tokens,
1536 x 576: with AMX 0.45 ms (bfloat16: 0.81), with VNNI alone 2.1 (9.3).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from slimtune.kernels import compiled

Gridder = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""From the least and greatest values `[n, 1]` of tokens to their scales and zero points, in `[0, 2**bits)`."""

CHUNK = 1 << 17
"""Values rounded together: what they need stays in a core's cache (512 KB in float32)."""

PIECE = 1 << 21
"""Results in float32 at a time (8 MB): more would be fresh pages from the system in every call."""

MIDDLE = 128
"""The code of a zero in `Tokens`."""


class Tokens(NamedTuple):
    """Rounded tokens: codes, uint8 `[n, in]`; scales, float32 `[n, 1]`; and zero points `[n, 1]`, or `None` where they
    are 0. Codes are `MIDDLE` more, and zero points no more, than with zeros in the middle of the grid; Triton's codes
    are int8, and no more either."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Weight(NamedTuple):
    """A weight in whole numbers, packed by oneDNN; scales, float32 `[out]`; sums of its rows times their scales; and
    its zero points."""

    packed: Tensor
    scale: Tensor
    sums: Tensor
    zeros: Tensor


@cache
def fast() -> bool:
    """Whether this processor multiplies 8-bit integers faster than floats, and oneDNN is there to do it."""
    units = torch.cpu.get_capabilities()
    known = any(units.get(unit) for unit in ("avx_vnni", "avx512_vnni", "amx_int8"))
    return known and torch.backends.mkldnn.is_available()


def weight(codes: Tensor, scale: Tensor) -> Weight:
    """`codes` (int8 `[out, in]`, zero points taken off) and `scale` (`[out]`) as `multiply` wants them."""
    v = scale.to(torch.float32)
    sums = codes.sum(1, dtype=torch.int32) * v
    return Weight(torch.ops.onednn.qlinear_prepack(codes, None), v, sums, torch.zeros(len(v), dtype=torch.int64))


def round_tokens(x: Tensor, bits: int, grid: Gridder, *, symmetric: bool) -> Tokens:
    """The tokens `x` (float `[n, in]`) on their grids."""
    (rows, columns), middle = x.shape, 2 ** (bits - 1)
    step = max(1, CHUNK * torch.get_num_threads() // max(columns, 1))
    native = compiled.fits(x)
    scale, zero = grid(*(compiled.ends(x) if native else _ends(x, step, symmetric=symmetric)))
    if native:
        given = None if symmetric else zero
        return Tokens(compiled.round_rows(x, scale, given, bits), scale, None if symmetric else zero - middle)
    codes = torch.empty(x.shape, dtype=torch.int8)
    work = torch.empty((min(step, rows), columns), dtype=torch.float32)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        part = work[: min(step, rows - start)].copy_(x[here]).div_(scale[here]).round_()
        if not symmetric:
            part.add_(zero[here] - middle)
        codes[here] = part.clamp_(-middle, middle - 1)
    # To int8 and on from there: PyTorch converts to uint8 one value after the other.
    return Tokens(codes.view(torch.uint8).bitwise_xor_(MIDDLE), scale, None if symmetric else zero - middle)


def _ends(x: Tensor, step: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The least value of each token or 0, and the greatest or 0: float32 `[n, 1]`; symmetric ends where that is all
    that is wanted."""
    if symmetric and x.element_size() == 2:
        # Halves without their sign are in the order of the whole numbers in their place, which compare much faster.
        high = (x.view(torch.int16) & 0x7FFF).amax(1, keepdim=True).view(x.dtype).to(torch.float32)
        return -high, high
    low, high = (torch.empty((len(x), 1), dtype=torch.float32) for _ in range(2))
    for start in range(0, len(x), step):
        here = slice(start, start + step)
        part = x[here].to(torch.float32)
        # Two reductions: `aminmax` is several times slower than both.
        low[here], high[here] = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
    return low.clamp_(max=0), high.clamp_(min=0)


def multiply(tokens: Tokens, w: Weight, dtype: torch.dtype) -> Tensor:
    """`y`, `dtype [n, out]`."""
    rows, step = len(tokens.codes), max(1, PIECE // len(w.scale))
    if compiled.fits(w.scale) and dtype in compiled.KINDS:
        y = torch.empty((rows, len(w.scale)), dtype=dtype)
        for start in range(0, rows, step):
            here = slice(start, start + step)
            zero = None if tokens.zero is None else tokens.zero[here]
            compiled.rescale(_sums(tokens.codes[here], w), tokens.scale[here], zero, w.sums, y[here])
        return y
    if rows <= step:
        return _product(tokens, w, slice(None)).to(dtype)
    y = torch.empty((rows, len(w.scale)), dtype=dtype)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        y[here] = _product(tokens, w, here)
    return y


def _sums(codes: Tensor, w: Weight) -> Tensor:
    """The products of codes with a weight, its scales on them: float32 `[n, out]`."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, MIDDLE, w.packed, w.scale, w.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def _product(tokens: Tokens, w: Weight, rows: slice) -> Tensor:
    y = _sums(tokens.codes[rows], w)
    if tokens.zero is not None:
        y.addmm_(tokens.zero[rows], w.sums.unsqueeze(0), alpha=-1)
    return y.mul_(tokens.scale[rows])


_weights = WeakTensorKeyDictionary()
_last = threading.local()


def kept_weight(stored: Sequence[Tensor], make: Callable[[], Weight]) -> Weight:
    """The weight that belongs to the `stored` tensors: made once, and again when one of them was written to."""
    stamp = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in stored]
    found = _weights.get(stored[0])
    if found is None or found[0] != stamp:
        found = stamp, make()
        _weights[stored[0]] = found
    return cast(Weight, found[1])


def same_tokens(x: Tensor, how: object, make: Callable[[], Tokens]) -> Tokens:
    """The rounded tokens of `x`: those of the call before where it had the same input and rounded it alike, as the
    projections of an attention do."""
    if x.is_inference():  # has no version: it may have been written to
        return make()
    before = getattr(_last, "call", None)
    if before is not None and before[0]() is x and before[1:3] == (x._version, how):
        return cast(Tokens, before[3])
    tokens = make()
    _last.call = weakref.ref(x), x._version, how, tokens
    return tokens
