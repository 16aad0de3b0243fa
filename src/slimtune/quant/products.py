"""Products with a packed weight, which is decoded a few rows at a time.

What a processor decodes into its cache and multiplies there need not be written to memory and read back, and no whole
weight is allocated: fresh pages cost more than decoding into them. Measured on one core, 256 tokens, 4 bits, 8192 x
2048: 22 ms and back 25 instead of 67 and 62, of which the products take 9. Layouts whose rows do not stand alone are
decoded whole, as all are on a GPU.

For a few vectors loops in C decode a row and multiply it (`multiplier`).

A weight in a rotated basis is turned back only where that costs less than to turn what it is multiplied by: on one core
8192 x 2048 takes 0.12 s of turning, 256 tokens 0.02.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.kernels import compiled
from slimtune.kernels.dispatch import transform
from slimtune.linalg import trellis
from slimtune.linalg.levels import LEVELS
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.rotated import Lattice, Trellis, turned_pieces, wide

PIECE = 2**21
"""Weights that are decoded at once: 4 MB in 16 bits."""


Product = Callable[[Tensor], Tensor]
"""`x Wᵀ`: `[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""


def multiplier(weight: QTensor) -> Product | None:
    """`x Wᵀ` of a few vectors by the loops in C, with the weight left packed; computed in float32, rounded once.

    None where there are no loops for it: no compiler, a tensor that is not on a CPU, another layout.

    Example:
        >>> from slimtune.quant import Rtn
        >>> q, x = Rtn(bits=3, group_size=32)(torch.randn(6, 64), {}), torch.randn(3, 64)
        >>> product = multiplier(q)
        >>> product is None or bool(torch.allclose(product(x), x @ q.dequantize().T, atol=1e-5))
        True
    """
    layout, stored = weight.layout, {name: _readable(tensor) for name, tensor in weight.tensors.items()}
    with torch.no_grad():
        if not compiled.fits(*stored.values()):
            return None
        codes, scale = stored["codes"], stored.get("scale")
        product: Product
        if isinstance(layout, Affine):
            grid = {"scale": scale, "zero": stored.get("zero"), "bits": layout.bits, "group_size": layout.group_size}
            product = partial(compiled.multiply_affine, codes=codes, **cast(dict[str, Any], grid))
        elif isinstance(layout, Codebook):
            scale, levels = layout.scales(stored, torch.float32), LEVELS[layout.levels]
            product = partial(
                compiled.multiply_codebook, codes=codes, scale=scale, levels=levels, group_size=layout.group_size
            )
        elif isinstance(layout, Lattice | Trellis):
            product = _turned(layout, stored)
        else:
            return None
    return partial(_rows, product)


def _rows(product: Product, x: Tensor) -> Tensor:
    y = product(x.reshape(-1, x.shape[-1]).float())
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in compiled.KINDS else tensor.float()


def _turned(layout: Lattice | Trellis, stored: Mapping[str, Tensor]) -> Product:
    """Of a weight in a rotated basis."""
    codes, bits = stored["codes"], layout.bits
    if isinstance(layout, Lattice):
        inside = partial(compiled.multiply_lattice, codes=codes, bits=bits)
    else:
        numbers = trellis.numbers(bits, torch.float32, codes.device)
        inside = partial(compiled.multiply_trellis, codes=codes, numbers=numbers, bits=bits)
    return lambda x: _out_of_basis(inside(_into_basis(x, layout, stored)), layout, stored)


def _into_basis(x: Tensor, layout: Lattice | Trellis, stored: Mapping[str, Tensor]) -> Tensor:
    """Inputs as `C` of `W = diag(sign_out) Hᵀ C H diag(sign_in)` reads them."""
    into, columns = stored["sign_in"].to(x.dtype), layout.turned_shape[1]
    with torch.autocast(x.device.type, enabled=False):
        return transform(pad(x * into, (0, columns - layout.in_features)))


def _out_of_basis(y: Tensor, layout: Lattice | Trellis, stored: Mapping[str, Tensor]) -> Tensor:
    """Outputs of `C` as those of `W`."""
    with torch.autocast(y.device.type, enabled=False):
        return transform(y, inverse=True)[:, : layout.out_features] * stored["sign_out"].to(y.dtype)


def times_transposed(x: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x Wᵀ`: `x` `[tokens, in_features]` to `[tokens, out_features]`, in the dtype of `x`.

    Example:
        >>> from slimtune.quant import Rtn
        >>> q, x = Rtn(bits=4, group_size=32)(torch.randn(6, 64), {}), torch.randn(3, 64)
        >>> bool(torch.allclose(times_transposed(x, q.layout, q.tensors), x @ q.dequantize().T, atol=1e-5))
        True
    """
    if isinstance(layout, Lattice | Trellis) and _turning_pays(x, layout):
        return _times_turned_transposed(x, layout, tensors)
    if not _in_pieces(x, layout):
        return x @ layout.dequantize(tensors, x.dtype).T
    y = x.new_empty(len(x), layout.out_features)
    for rows, piece, stored in _pieces(layout, tensors):
        torch.mm(x, piece.dequantize(stored, x.dtype).T, out=y[:, rows])
    return y


def times(grad: Tensor, layout: Layout, tensors: Mapping[str, Tensor], onto: Tensor | None = None) -> Tensor:
    """`dy W`: `grad` `[tokens, out_features]` to `[tokens, in_features]`, in its dtype; where `onto` is given, added to
    it in place. Pieces add up in float32."""
    if isinstance(layout, Lattice | Trellis) and _turning_pays(grad, layout):
        total = _times_turned(grad, layout, tensors)
        return total.to(grad.dtype) if onto is None else onto.add_(total)
    if not _in_pieces(grad, layout):
        weight = layout.dequantize(tensors, grad.dtype)
        return grad @ weight if onto is None else onto.addmm_(grad, weight)
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(len(grad), layout.in_features, dtype=wide, device=grad.device)
    for rows, piece, stored in _pieces(layout, tensors):
        total += grad[:, rows] @ piece.dequantize(stored, grad.dtype)
    return total.to(grad.dtype) if onto is None else onto.add_(total)


def _turning_pays(x: Tensor, layout: Lattice | Trellis) -> bool:
    """Whether turning `x` and the result costs less than turning the weight.

    Not in float16: a turned weight has entries of about 1, the scales of its rows come later, and sums would be beyond
    what float16 holds, or gradients below it.
    """
    return (
        x.dtype != torch.float16
        and 2 * len(x) * (layout.in_features + layout.out_features) < layout.in_features * layout.out_features
    )


def _times_turned_transposed(x: Tensor, layout: Lattice | Trellis, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x Wᵀ` by the turned weight: turned in float32 at least, multiplied in the dtype of `x`."""
    turned = _into_basis(x.to(wide(x.dtype)), layout, tensors).to(x.dtype)
    y = x.new_empty(len(x), layout.turned_shape[0])
    for rows, piece in turned_pieces(layout, tensors["codes"], x.dtype, PIECE):
        torch.mm(turned, piece.T, out=y[:, rows])
    return _out_of_basis(y.to(wide(x.dtype)), layout, tensors).to(x.dtype)


def _times_turned(grad: Tensor, layout: Lattice | Trellis, tensors: Mapping[str, Tensor]) -> Tensor:
    """`dy W` likewise: what goes out of the basis forward comes into it here, and the other way round."""
    work, (down, across) = wide(grad.dtype), layout.turned_shape
    total = torch.zeros(len(grad), across, dtype=work, device=grad.device)
    with torch.autocast(grad.device.type, enabled=False):
        scaled = pad(grad.to(work) * tensors["sign_out"].to(work), (0, down - layout.out_features))
        turned = transform(scaled).to(grad.dtype)
        for rows, piece in turned_pieces(layout, tensors["codes"], grad.dtype, PIECE):
            total += turned[:, rows] @ piece
        return transform(total, inverse=True)[:, : layout.in_features] * tensors["sign_in"].to(work)


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
