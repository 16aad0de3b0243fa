"""The weights of a model as pruning sees them: whatever wraps or packs them, and one part of them at a time.

A linear may be dense, packed (a module with `dequantize` and `select`, such as slimtune's `QuantLinear`) or wrapped by
a LoRA layer (children `base_layer`, `lora_A`, `lora_B`, PEFT's names).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from slimtune.prune.groups import Part


@runtime_checkable
class Packed(Protocol):
    """A linear whose weight is stored in few bits."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, `dtype [out, in]`."""

    def select(self, rows: Tensor | None, columns: Tensor | None) -> tuple[nn.Module, str]:
        """The smaller linear, and why its weight had to be quantized again ("" where it did not)."""


class Factors(NamedTuple):
    """One adapter's factors in a LoRA layer: `W + scaling * B A`."""

    a: nn.Linear
    b: nn.Linear
    scaling: float


def base_layer(module: nn.Module) -> nn.Module:
    """The module inside LoRA layers, or the module itself."""
    inner = dict(module.named_children()).get("base_layer")
    return module if inner is None else base_layer(inner)


def factors(module: nn.Module) -> Iterator[Factors]:
    """The adapters of a LoRA layer; none of any other module."""
    children = dict(module.named_children())
    if "base_layer" in children and "lora_A" in children:
        scaling = cast(Any, module).scaling
        pairs = ((name, children["lora_A"].get_submodule(name)) for name, _ in children["lora_A"].named_children())
        for name, a in pairs:
            b = children["lora_B"].get_submodule(name)
            assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)  # a LoRA layer of a linear
            yield Factors(a, b, scaling[name])


@torch.no_grad()
def weight_of(module: nn.Module) -> Tensor:
    """What the layer computes with, adapters included: float32 `[out, in]`, or wider where the weight is.

    An embedding's is turned, so that dim 0 is what it writes.
    """
    layer = base_layer(module)
    if isinstance(layer, Packed):
        weight = layer.dequantize()
    else:
        weight = cast(Tensor, layer.weight).detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight = weight.T if isinstance(layer, nn.Embedding) else weight
    for a, b, scaling in factors(module):
        weight = weight + scaling * (b.weight.to(weight.dtype) @ a.weight.to(weight.dtype))
    return weight


def of_part(weight: Tensor, part: Part, units: int) -> Tensor:
    """The share of `weight` (`[out, in]`) in each unit: `[units, size, n]`."""
    across = weight if part.dim == 0 else weight.T
    return across[part.start : part.start + units * part.size].reshape(units, part.size, -1)
