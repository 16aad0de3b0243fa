"""Products with a packed weight, which is decoded a few rows at a time.

What a processor decodes into its cache and multiplies there need not be written to memory and read back, and no whole
weight is allocated: fresh pages cost more than decoding into them. Measured on one core, 256 tokens, 4 bits, 8192 x
2048: 22 ms and back 25 instead of 67 and 62, of which the products take 9. Layouts whose rows do not stand alone are
decoded whole, as all are on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from slimtune.quant.layouts import Layout

PIECE = 2**21
"""Weights that are decoded at once: 4 MB in 16 bits."""


def times_transposed(x: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x Wᵀ`: `x` `[tokens, in_features]` to `[tokens, out_features]`, in the dtype of `x`.

    Example:
        >>> from slimtune.quant import Rtn
        >>> q, x = Rtn(bits=4, group_size=32)(torch.randn(6, 64), {}), torch.randn(3, 64)
        >>> bool(torch.allclose(times_transposed(x, q.layout, q.tensors), x @ q.dequantize().T, atol=1e-5))
        True
    """
    if not _in_pieces(x, layout):
        return x @ layout.dequantize(tensors, x.dtype).T
    y = x.new_empty(len(x), layout.out_features)
    for rows, piece, stored in _pieces(layout, tensors):
        torch.mm(x, piece.dequantize(stored, x.dtype).T, out=y[:, rows])
    return y


def times(grad: Tensor, layout: Layout, tensors: Mapping[str, Tensor], onto: Tensor | None = None) -> Tensor:
    """`dy W`: `grad` `[tokens, out_features]` to `[tokens, in_features]`, in its dtype; where `onto` is given, added to
    it in place. Pieces add up in float32."""
    if not _in_pieces(grad, layout):
        weight = layout.dequantize(tensors, grad.dtype)
        return grad @ weight if onto is None else onto.addmm_(grad, weight)
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(len(grad), layout.in_features, dtype=wide, device=grad.device)
    for rows, piece, stored in _pieces(layout, tensors):
        total += grad[:, rows] @ piece.dequantize(stored, grad.dtype)
    return total.to(grad.dtype) if onto is None else onto.add_(total)


def _in_pieces(x: Tensor, layout: Layout) -> bool:
    large = layout.out_features * layout.in_features > PIECE
    return large and layout.rowwise and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _pieces(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[slice, Layout, dict[str, Tensor]]]:
    """Some rows at a time: which, and their layout and tensors."""
    height = max(1, PIECE // layout.in_features)
    for start in range(0, layout.out_features, height):
        rows = slice(start, min(start + height, layout.out_features))
        piece = cast(Layout, replace(cast(Any, layout), out_features=rows.stop - start))
        yield rows, piece, {name: tensor[rows] for name, tensor in tensors.items()}
