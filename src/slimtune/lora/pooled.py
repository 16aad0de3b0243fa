"""Adapters that fold into zero points to the last bit: A sees the mean of each quantization group (QA-LoRA).

Source: arXiv 2309.14717. Where A has one number for all input features of a group, `s B A` is one number per group and
output feature too, and `(q - z) t + d = (q - (z - d / t)) t`: the codes and scales stay, the zero point moves. It must
be stored in float32, not as a whole number.

A stays PEFT's, `[r, in]`, equal within each group: it starts so, and its gradient is averaged over the group, so every
elementwise optimizer keeps it so. The adapter is a stock one, on the original model as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Affine, Layout
from slimtune.quant.linear import QuantLinear

DRIFT = 1e-6
"""How far numbers of a group may be apart, beside the largest of A, and still count as one."""


NO_GROUPS = (
    "no adapted layer has quantization groups to pool",
    "quantize with rtn, optq or hqq before, or leave out pooled",
)
"""What is wrong where there is nothing to pool, and what to do about it."""


def poolable(layout: Layout) -> TypeGuard[Affine]:
    """Whether a layer of this layout has groups to pool, and zero points to fold into."""
    return isinstance(layout, Affine)


def spread(pooled: Tensor, size: int, width: int) -> Tensor:
    """`[r, groups]`, each number for its group of `size` features: `[r, width]`.

    >>> spread(torch.tensor([[1, 2]]), 2, 3)
    tensor([[1, 1, 2]])
    """
    return pooled.repeat_interleave(size, 1)[:, :width]


def group_means(x: Tensor, size: int) -> Tensor:
    """The mean of each group of `size` columns of `x` (`[r, width]`), the last of which may be shorter.

    >>> group_means(torch.tensor([[1.0, 3.0, 5.0]]), 2)
    tensor([[2., 5.]])
    """
    return torch.stack([part.mean(1) for part in x.split(size, 1)], 1)


def pooled_factor(a: Tensor, size: int) -> Tensor | None:
    """The one number of each group, `[r, groups]`, of an A (`[r, in]`) that has one; None for any other."""
    means = group_means(a, size)
    off = (a - spread(means, size, a.shape[1])).abs().max()
    return means if bool(off <= DRIFT * a.abs().max()) else None


@torch.no_grad()
def pool_(layers: Mapping[str, Any], *, fresh: bool = False) -> int:
    """Keep the A of every adapted layer (PEFT's, by name) pooled over its quantization groups while it trains.

    Those that are so already, or where `fresh` all on affine bases; returns how many.
    """
    count = 0
    for layer in layers.values():
        base = layer.get_base_layer()
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A or not isinstance(base, QuantLinear) or not poolable(base.layout):
                continue
            a, size = layer.lora_A[adapter].weight, min(base.layout.group_size, base.in_features)
            if fresh:
                a.copy_(spread(a[:, ::size], size, a.shape[1]))  # as it was drawn, one number of each group
            elif size == 1 or pooled_factor(a, size) is None:
                continue
            a.register_hook(partial(_averaged, size))
            count += 1
    return count


def _averaged(size: int, grad: Tensor) -> Tensor:
    return spread(group_means(grad, size), size, grad.shape[1])


def fold(base: QTensor, update: Tensor) -> QTensor | None:
    """`base` (affine) with `update` (`[out, groups]`: what is added to each weight of a group) in its zero points.

    None where a group has the scale 0, which no zero point moves.

    Example:
        >>> from slimtune.quant.rtn import Rtn
        >>> base = Rtn(bits=3, group_size=4)(torch.randn(5, 8), {})
        >>> update = torch.randn(5, 2)
        >>> folded = fold(base, update)
        >>> wanted = base.dequantize() + update.repeat_interleave(4, 1)
        >>> bool(torch.allclose(folded.dequantize(), wanted, atol=1e-5))
        True
    """
    layout = base.layout
    assert isinstance(layout, Affine)
    scale = base.tensors["scale"].double()
    if not bool((scale != 0).all()):
        return None
    zero = base.tensors.get("zero", torch.full_like(scale, 2 ** (layout.bits - 1))).double()
    moved = (zero - update.double() / scale).float()
    kept = {name: tensor for name, tensor in base.tensors.items() if name != "zero"}
    return QTensor({**kept, "zero": moved}, replace(layout, symmetric=False, float_zero=True, zero_dtype="float32"))


@torch.no_grad()
def fold_(layers: Mapping[str, Any]) -> list[str]:
    """Fold the adapter of every layer (PEFT's, by name) whose A is pooled into its base, and leave it with nothing to
    add; returns the names."""
    folded = []
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, QuantLinear) or not isinstance(base.layout, Affine):
            continue
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        size = min(base.layout.group_size, base.in_features)
        pooled = [pooled_factor(layer.lora_A[adapter].weight.float(), size) for adapter in active]
        if not active or any(a is None for a in pooled):
            continue
        update = sum(
            layer.scaling[adapter] * layer.lora_B[adapter].weight.double() @ a.double()
            for adapter, a in zip(active, pooled, strict=True)
            if a is not None
        )
        made = fold(base.qtensor, torch.as_tensor(update))
        if made is None:
            continue
        twin = QuantLinear(made.layout, device="meta", activations=base.activations)
        for key, tensor in made.tensors.items():
            setattr(twin, key, torch.nn.Parameter(tensor, requires_grad=False))
        twin.bias = base.bias
        layer.base_layer = twin.train(base.training)
        for adapter in active:
            layer.lora_B[adapter].weight.zero_()
        folded.append(name)
    return folded
