"""The weights of a model as pruning sees them: whatever wraps or packs them, and one part of them at a time.

A linear may be dense, packed (a module with `dequantize` and `select`, such as slimtune's `QuantLinear`) or wrapped by
a LoRA layer (children `base_layer`, `lora_A`, `lora_B`, PEFT's names), one of DoRA too (`lora_magnitude_vector`), which
gives rows a length that was learnt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap
from slimtune.prune.groups import Part
from slimtune.prune.importance import lora_gradient

ENTRIES = 1 << 20
"""Numbers of a weight that are looked at together, about."""


@runtime_checkable
class Packed(Protocol):
    """A linear whose weight is stored in few bits."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, `dtype [out, in]`."""

    def select(self, rows: Tensor | None, columns: Tensor | None) -> tuple[nn.Module, str]:
        """The smaller linear, and why its weight had to be quantized again ("" where it did not)."""


@runtime_checkable
class Follower(Protocol):
    """A module that notes something of the whole model's weights, such as the basis of a rotated one."""

    def follow_(
        self, model: nn.Module, modelmap: ModelMap, rows: Mapping[str, Collection[int]], blocks: Collection[int]
    ) -> None:
        """Learn that no more is left of `model`, whose map was `modelmap`, than these `blocks`, by index, and these
        `rows` of ports by name (all of a port that is not named)."""


class Factors(NamedTuple):
    """One adapter's factors in a LoRA layer: `W + scaling * B A`.

    Each is a linear, or a module with a `weight` like one's of which a part is frozen (`held`, `trained`).
    """

    a: nn.Module
    b: nn.Module
    scaling: float
    magnitude: Tensor | None = None  # DoRA's: the length of every row of the sum


def base_layer(module: nn.Module) -> nn.Module:
    """The module inside LoRA layers, or the module itself."""
    inner = dict(module.named_children()).get("base_layer")
    return module if inner is None else base_layer(inner)


def factors(module: nn.Module) -> Iterator[Factors]:
    """The adapters of a LoRA layer; none of any other module."""
    children = dict(module.named_children())
    magnitudes = dict(children.get("lora_magnitude_vector", nn.Module()).named_children())
    if "base_layer" in children and "lora_A" in children:
        scaling = cast(Any, module).scaling
        pairs = ((name, children["lora_A"].get_submodule(name)) for name, _ in children["lora_A"].named_children())
        for name, a in pairs:
            magnitude = cast(Tensor, magnitudes[name].weight) if name in magnitudes else None
            yield Factors(a, children["lora_B"].get_submodule(name), scaling[name], magnitude)


def lengths(module: nn.Module) -> list[Tensor | None]:
    """Of every adapter of a layer, the lengths of the rows of base and update together, by which DoRA divides them;
    None of an adapter without magnitudes."""
    weight = None
    found: list[Tensor | None] = []
    for a, b, scaling, magnitude in factors(module):
        if magnitude is None:
            found.append(None)
            continue
        weight = whole_weight(base_layer(module)) if weight is None else weight
        update = cast(Tensor, b.weight).detach() @ cast(Tensor, a.weight).detach()
        found.append((weight + scaling * update.to(weight.dtype)).norm(dim=1))
    return found


def held(linear: nn.Module) -> list[Tensor]:
    """All that a linear or a factor holds: parts of its weight that lie as the whole does along its features, and a
    bias."""
    return [*linear.parameters(recurse=False), *linear.buffers(recurse=False)]


def trained(factor: nn.Module) -> Tensor:
    """The rows of A or columns of B that train: all of them, or a part."""
    return next(parameter for parameter in factor.parameters(recurse=False) if parameter.ndim == 2)


def whole_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer that nothing wraps, `[out, in]`, decoded where it is packed; dim 0 is what it writes."""
    whole = layer.dequantize() if isinstance(layer, Packed) else cast(Tensor, layer.weight).detach()
    return whole.T if isinstance(layer, nn.Embedding) else whole


def part_of(features: Tensor, part: Part, units: range) -> Tensor:
    """Of `[tokens, features]` on the part's side of its port, those of these units."""
    return features[:, _of_units(part, units)]


def runs(part: Part, units: int, across: int) -> Iterator[range]:
    """The units of a part, so many at a time that their share in a weight with `across` numbers on its other side is
    small beside the weight."""
    step = max(1, ENTRIES // (part.size * across))
    return (range(start, min(start + step, units)) for start in range(0, units, step))


@torch.no_grad()
def shares(module: nn.Module, part: Part, units: int) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    """Some units of a part at a time: their share in what the layer computes with, adapters included (`[units, size,
    n]`, float32, or wider where the weight is), and in the weight's gradient, by what those of its factors say of it.
    """
    whole = whole_weight(base_layer(module))
    wide = torch.promote_types(whole.dtype, torch.float32)
    divisors = lengths(module)

    def shaped(share: Tensor, some: range) -> Tensor:
        return (share if part.dim == 0 else share.T).reshape(len(some), part.size, -1)

    for some in runs(part, units, whole.shape[1 - part.dim]):
        rows, columns = (_of_units(part, some) if part.dim == dim else slice(None) for dim in (0, 1))
        own, said = whole[rows, columns].to(wide), None
        weight = own
        for (a, b, scaling, magnitude), length in zip(factors(module), divisors, strict=True):
            left, right = (cast(Tensor, factor.weight) for factor in (b, a))
            more = scaling * (left[rows].to(wide) @ right[:, columns].to(wide))
            if magnitude is not None and length is not None:
                more = (magnitude / length).to(wide)[rows, None] * (own + more) - own
            weight = weight + more
            left, right = trained(b), trained(a)
            to_a, to_b = (torch.zeros_like(f) if f.grad is None else f.grad for f in (right, left))
            parts = (right[:, columns], left[rows], to_a[:, columns], to_b[rows])
            more = lora_gradient(*(of_units.to(wide) for of_units in parts))
            said = more if said is None else said + more
        yield some, shaped(weight, some), None if said is None else shaped(said, some)


def _of_units(part: Part, units: range) -> slice:
    return slice(part.start + units.start * part.size, part.start + units.stop * part.size)
