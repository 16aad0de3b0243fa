"""Products of whole numbers: a linear whose weight and input are both in at most 8 bits.

`y[t, o] = s[t] * v[o] * sum_i (q[t, i] - z[t]) * c[o, i]` with the codes `q` of a token, its scale `s` and zero point
`z`, and the codes `c` of an output with its scale `v`. The sum is exact in int32; what is rounded is its scaling, in
float32, and the result, once, to the dtype of the input. The codes are those of the reference to the last one, since
the grid is the caller's and values are divided by their scale, not multiplied by its inverse.

Two backends: oneDNN's int8 linear, whose weight is packed for the processor once (measured on one core with AMX, 512
tokens, against bfloat16: 1.8 to 2.4 times as fast), and `torch._int_mm`, which packs it in every call (0.7 to 1.6).
Packed weights take a byte a weight and are kept as long as their codes live.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

Gridder = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""From the least and greatest values `[n, 1]` of tokens to their scales and zero points, in `[0, 2**bits)`."""

CHUNK = 1 << 17
"""Values rounded together: what they need stays in a core's cache (512 KB in float32)."""


class Tokens(NamedTuple):
    """Rounded tokens: codes less `2**(bits - 1)`, int8 `[n, in]`; scales, float32 `[n, 1]`; and zero points less the
    same, or `None` where they are 0."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Weight(NamedTuple):
    """A weight in whole numbers: packed by oneDNN where `packed`, or int8 `[out, in]`; scales, float32 `[out]`; and
    sums of its rows times their scales."""

    codes: Tensor
    packed: bool
    scale: Tensor
    sums: Tensor
    zeros: Tensor


@cache
def fast() -> bool:
    """Whether this processor multiplies 8-bit integers faster than floats, and oneDNN is there to do it."""
    units = torch.cpu.get_capabilities()
    return bool(units.get("avx512_vnni") or units.get("amx_int8")) and torch.backends.mkldnn.is_available()


def weight(codes: Tensor, scale: Tensor, *, packed: bool) -> Weight:
    """`codes` (int8 `[out, in]`, zero points taken off) and `scale` (`[out]`) as `multiply` wants them."""
    v = scale.to(torch.float32)
    sums = codes.sum(1, dtype=torch.int32) * v
    kept = torch.ops.onednn.qlinear_prepack(codes, None) if packed else codes
    return Weight(kept, packed, v, sums, torch.zeros(len(v), dtype=torch.int64))


def round_tokens(x: Tensor, bits: int, grid: Gridder, *, symmetric: bool) -> Tokens:
    """The tokens `x` (float `[n, in]`) on their grids."""
    (rows, columns), middle = x.shape, 2 ** (bits - 1)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    zero = None if symmetric else torch.empty_like(scale)
    step = max(1, CHUNK * torch.get_num_threads() // max(columns, 1))
    work = torch.empty((min(step, rows), columns), dtype=torch.float32, device=x.device)
    for start in range(0, rows, step):
        part = work[: min(step, rows - start)].copy_(x[start : start + step])
        # Two reductions: `aminmax` is several times slower than both.
        s, z = grid(part.amin(1, keepdim=True).clamp_(max=0), part.amax(1, keepdim=True).clamp_(min=0))
        scale[start : start + step] = s
        part.div_(s).round_()
        if zero is not None:
            zero[start : start + step] = z - middle
            part.add_(z - middle)
        codes[start : start + step] = part.clamp_(-middle, middle - 1)
    return Tokens(codes, scale, zero)


def multiply(tokens: Tokens, w: Weight, dtype: torch.dtype) -> Tensor:
    """`y`, `dtype [n, out]`."""
    y = _product(tokens.codes, w)
    if tokens.zero is not None:
        y.addmm_(tokens.zero, w.sums.unsqueeze(0), alpha=-1)
    return y.mul_(tokens.scale).to(dtype)


def _product(codes: Tensor, w: Weight) -> Tensor:
    if w.packed:
        made = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, w.codes, w.scale, w.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return cast(Tensor, made)
    return int_mm(codes, w.codes).mul(w.scale)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`a bᵀ` of int8 `[n, k]` and `[m, k]`, int32 `[n, m]`, of any shape: filled up with zeros to what CUDA takes."""
    (n, k), m = a.shape, len(b)
    if a.device.type == "cuda":
        a = pad(a, (0, -k % 8, 0, max(0, 17 - n)))
        b = pad(b, (0, -k % 8, 0, -m % 8))
    return torch._int_mm(a, b.T)[:n, :m]


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
