"""A smaller weight out of a packed one: some of its rows and columns.

Rows of a rowwise layout are slices. Columns are cut exactly where whole groups go, or a row is one group; where a group
would lose a part, what is left of it no longer has its scale to itself, and the weight is rounded again. So it is where
scales are nested in runs that would lose one, and in a basis that mixes rows and columns. It is rounded by the method
that makes the layout, in as many bits, without calibration: no inputs are at hand when a model is cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from slimtune.linalg.packing import pack, unpack
from slimtune.quant.again import TURNED, fresh
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import NEST, Affine, Codebook
from slimtune.quant.rtn import AFFINE_BITS, Rtn

PER_ROW = ("step", "offset")
"""Tensors of a grouped layout that do not have a column a group."""


def select(weight: QTensor, rows: Tensor | None, columns: Tensor | None) -> tuple[QTensor, str]:
    """The weight of these rows and columns (int64 indices in ascending order; None: all), and why its codes had to be
    rounded again ("" where they are what they were).

    >>> w = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    >>> q = Rtn(bits=4, group_size=4)(w, {})
    >>> smaller, reason = select(q, torch.tensor([0, 2]), torch.arange(4, 8))
    >>> reason, bool((smaller.dequantize() == q.dequantize()[[0, 2], 4:]).all())
    ('', True)
    """
    if rows is not None and weight.layout.rowwise:
        tensors = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in weight.tensors.items()}
        weight = QTensor(tensors, cast(Any, replace)(weight.layout, out_features=len(rows)))
        rows = None
    if columns is not None and isinstance(weight.layout, Affine | Codebook):
        smaller = _columns(weight, weight.layout, columns)
        if smaller is not None:
            weight, columns = smaller, None
    if rows is None and columns is None:
        return weight, ""
    return _rounded_again(weight, rows, columns)


def _columns(weight: QTensor, layout: Affine | Codebook, columns: Tensor) -> QTensor | None:
    """The weight of these columns, exactly; None where a group would be broken, or a group of nested scales."""
    columns = columns.to(weight.tensors["codes"].device)
    group = torch.arange(layout.in_features, device=columns.device) // layout.group_size
    kept, all_of = (torch.bincount(g, minlength=layout.groups) for g in (group[columns], group))
    whole = (kept == all_of) | (kept == 0)
    nested = isinstance(layout, Codebook) and layout.nested and layout.groups > NEST
    if layout.groups > 1 and not bool(whole.all()):
        return None
    if nested and len(columns) < layout.in_features:
        return None
    codes = unpack(weight.tensors["codes"], layout.bits, layout.in_features)[:, columns]
    groups = kept.nonzero().squeeze(1)
    tensors = {
        name: tensor if name in PER_ROW else tensor[:, groups].contiguous()
        for name, tensor in weight.tensors.items()
        if name != "codes"
    }
    tensors["codes"] = pack(codes.contiguous(), layout.bits)
    size = min(layout.group_size, len(columns))  # of a row that is one group
    return QTensor(tensors, replace(layout, in_features=len(columns), group_size=size))


def _rounded_again(weight: QTensor, rows: Tensor | None, columns: Tensor | None) -> tuple[QTensor, str]:
    layout = weight.layout
    dense = weight.dequantize()
    dense = dense if rows is None else dense[rows.to(dense.device)]
    dense = dense if columns is None else dense[:, columns.to(dense.device)]
    if (turned := TURNED.get(type(layout))) is not None:
        bits = cast(Any, layout).bits
        identity = torch.eye(dense.shape[1], device=dense.device)  # a sweep has nothing to make up for with it
        found = turned(bits=bits, sweeps=0)(dense, {"hessian": identity})
        what = "a basis that mixes rows and columns"
        return found, f"the layout '{layout.tag}' has {what}: rounded again to {bits} bits of it"
    if isinstance(layout, Affine | Codebook):
        what = f"groups of {layout.group_size} columns were broken: rounded again"
        if (anew := fresh(layout, dense, None)) is not None:
            return anew, what
        if isinstance(layout, Affine):
            return Rtn(bits=layout.bits, group_size=layout.group_size, sym=layout.symmetric)(dense, {}), what
    bits = next((bits for bits in AFFINE_BITS if bits >= weight.bits_per_weight - 1), 8)
    what = "scales that cannot be cut"
    return Rtn(bits=bits)(dense, {}), f"the layout '{layout.tag}' has {what}: rounded to {bits} bits, groups of 64"
