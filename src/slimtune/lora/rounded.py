"""Training an adapter on what will run: inputs and merged weights in few bits, straight-through (QAT-LoRA).

While the context is open, a LoRA layer on a linear `W` computes `Q_a(x) Q_w(W + s B A)ᵀ + b` and not `x Wᵀ + s (x Aᵀ)
Bᵀ + b`: that is the layer after merging and rounding to nearest. Both `Q` let gradients through as if they were not
there (arXiv 1308.3432). Input grids are those of `slimtune.quant.activation`. Weight grids span, in each row or group,
a fraction of the range that the weight has now; the fractions are those of the least squared error on the frozen `W`,
found once (and once more where pruning cuts it), so that the layer stays a function of its factors alone and an
interrupted run resumes to the same bits.
Nothing is known here of rotations: a rotated model trains alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from slimtune.errors import RecipeError
from slimtune.lora.attach import LoraLayer
from slimtune.lora.options import FakeQuant
from slimtune.quant.activation import Activations
from slimtune.quant.blackbox import FROZEN
from slimtune.quant.grid import mse_shrink, shrunken_grid
from slimtune.quant.rtn import group_width


@dataclass
class Switch:
    """Whether layers round while they train; in evaluation they always do."""

    on: bool = True


@contextmanager
def rounded_lora(model: nn.Module, options: FakeQuant) -> Iterator[Switch]:
    """Let the LoRA layers of `model` compute as rounded; afterwards they are as they were.

    Raises `RecipeError` where there are none, or one cannot be seen as one weight: it has dropout, a bias of its own,
    or is not a plain adapter.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise RecipeError("fake_quant rounds what an adapter trains", remedy="put a lora step before train")
    for name, layer in layers.items():
        _require_plain(name, layer)
    switch = Switch()
    try:
        for layer in layers.values():
            ratios = _Ratios(options)
            ratios.of(_weight(layer))
            cast(Any, layer).forward = partial(_forward, layer, options, switch, ratios)
        yield switch
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


class _Ratios:
    """The fractions of the ranges of a layer's groups, as they are when its weight first has its shape."""

    def __init__(self, options: FakeQuant) -> None:
        self._options, self._shape, self._found = options, torch.Size(), torch.empty(0)

    def of(self, weight: Tensor) -> Tensor:
        if weight.shape != self._shape:
            parts, options = _parts(weight, self._options), self._options
            self._shape, self._found = weight.shape, mse_shrink(parts, options.weights, options.sym)
        return self._found


def _forward(layer: LoraLayer, options: FakeQuant, switch: Switch, ratios: _Ratios, x: Tensor, *args: Any) -> Tensor:
    if layer.disable_adapters or (layer.training and not switch.on):  # a teacher is what it was
        return type(layer).forward(layer, x, *args)
    a, b = (cast(Tensor, factors["default"].weight) for factors in (layer.lora_A, layer.lora_B))
    with torch.autocast(x.device.type, enabled=False):  # a small update would be lost in bfloat16
        frozen = _weight(layer)
        merged = frozen + layer.scaling["default"] * (b.float() @ a.float())
    weight = cast(Tensor, _Nearest.apply(merged, ratios.of(frozen), options))
    read = Activations(options.activations, sym=options.activations_sym, clip_ratio=options.clip_ratio)(x)
    bias = cast("Tensor | None", layer.get_base_layer().bias)
    return linear(read, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Nearest(torch.autograd.Function):
    """A weight on its grids, straight-through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ratio: Tensor, options: FakeQuant) -> Tensor:
        if options.weights == 16:
            return weight.view_as(weight)
        parts = _parts(weight, options)
        nearest = shrunken_grid(parts, options.weights, options.sym, ratio).nearest(parts)
        return nearest.view(len(weight), -1)[:, : weight.shape[1]].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, None, None)


def _parts(weight: Tensor, options: FakeQuant) -> Tensor:
    """The groups of a weight as rows; a shorter last one is filled up with zeros, which every grid has."""
    size = group_width(options.group_size, weight.shape[1])
    return pad(weight.detach(), (0, -weight.shape[1] % size)).view(-1, size)


def _weight(layer: LoraLayer) -> Tensor:
    """The frozen weight, float32."""
    base = layer.get_base_layer()
    if isinstance(base, FROZEN):
        return base.dequantize(torch.float32)
    return cast(Tensor, base.weight).detach().to(torch.float32)


def _require_plain(name: str, layer: LoraLayer) -> None:
    adapters = list(layer.lora_A)
    dropout = any(not isinstance(part, nn.Identity) for part in layer.lora_dropout.values())
    bias = any(layer.lora_bias.values())
    if adapters != ["default"] or layer.lora_variant or layer.merged or dropout or bias:
        raise RecipeError(
            "fake_quant needs one plain adapter without dropout",
            where=name,
            got="lora_dropout" if dropout else ", ".join(adapters),
            remedy="leave out lora_dropout",
        )
