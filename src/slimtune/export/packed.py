"""The tensors of a packed layer that others wrote: checked, and put into the narrowest layout that says the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import FormatError
from slimtune.quant.activation import Activations
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Affine, Layout
from slimtune.quant.scattered import SCALES, Scattered

WHERE = "config.json, quantization_config"

Decoded = tuple[QTensor, Activations | None]
"""The weight of a layer, and how the layer rounds its input."""


def qtensor(name: str, codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> QTensor:
    """Affine codes in the narrowest layout that says the same: `codes` as slimtune packs them, `scale` and `zero`
    `[out, groups]`, `group` `[in]`. Raises `FormatError` where `scale` or `group` cannot be."""
    (rows, groups), columns = scale.shape, len(group)
    dtype, scale = scales_of(name, scale)
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    tensors = {"codes": codes, "scale": scale, "zero": zero.contiguous(), "group": group}
    size = max(1, int((group == 0).sum()))
    layout: Layout
    if -(-columns // size) == groups and torch.equal(group, torch.arange(columns, dtype=torch.int32) // size):
        layout = Affine(rows, columns, bits, size, symmetric, scale_dtype=dtype)
    else:
        layout = Scattered(rows, columns, bits, groups, symmetric, scale_dtype=dtype)
        layout.check(group, name)
    return QTensor({leaf: tensors[leaf] for leaf in layout.tensors()}, layout)


def scales_of(name: str, scale: Tensor) -> tuple[str, Tensor]:
    """The first dtype that holds all scales, by its name, and the scales in it. Raises `FormatError`."""
    if not bool(scale.isfinite().all()):
        raise FormatError("a packed layer has scales that are not finite", where=name)
    dtype = next((key for key, kind in SCALES.items() if exact(scale, kind)), "")
    if not dtype:
        raise FormatError("a packed layer has scales of an unknown dtype", where=name, got=str(scale.dtype))
    return dtype, scale.to(SCALES[dtype]).contiguous()


def exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of `tensor` is one of `dtype`."""
    return torch.equal(tensor.to(dtype).to(torch.float64), tensor.to(torch.float64))


def group_width(group_size: Any, in_features: int) -> int:
    """Features of a group: a `group_size` of -1, or one that is larger than all, is a whole row."""
    return in_features if group_size == -1 else max(1, min(int(group_size), in_features))


def require_tensors(name: str, tensors: Mapping[str, Tensor], wanted: set[str]) -> None:
    """Raise `FormatError` where the layer called `name` lacks some."""
    missing = sorted(wanted - set(tensors))
    if missing:
        raise FormatError("a packed layer lacks tensors", where=name, got=sorted(tensors), wanted=missing)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raise `FormatError` unless `tensor` has this shape, and this dtype (a float, where it is None)."""
    kind = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if tuple(tensor.shape) != shape or not kind:
        raise FormatError(
            "a packed layer has a wrong tensor",
            where=name,
            got=f"{tensor.dtype} {list(tensor.shape)}",
            wanted=f"{dtype or 'floats'} {list(shape)}",
        )
