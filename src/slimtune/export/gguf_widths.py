"""Blocks of different widths in a GGUF file: units that are all zeros are left out.

A configuration of transformers has one width for all blocks, so a model pruned with `widths: allocated`, or of whole
sub-layers, has zeros where the units that went were read (`slimtune.prune.surgery`). llama.cpp's `deci` computes what
its `llama` does with heads and FFN channels counted for each block, none included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.lora.attach import base_of, plain
from slimtune.lora.merge import merged_weight
from slimtune.prune.groups import Axis, axes

Gone = dict[str, dict[int, set[int]]]
"""Indices that are left out, by port and dimension (0 what it writes, 1 what it reads)."""


@dataclass(frozen=True)
class Widths:
    """What each block has: query heads, key-value heads, FFN channels. `gone` are the indices that are left out of a
    port's tensors, and `missing` the beginnings of names in the file that are not there at all."""

    heads: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    gone: Gone = field(default_factory=Gone)
    missing: tuple[str, ...] = ()

    def cut(self, tensor: str, value: Tensor) -> Tensor:
        """The tensor of the model called `tensor`, without what is left out."""
        for dim, indices in self._kept(tensor, value.shape):
            value = value.index_select(dim, indices)
        return value

    def filled(self, tensor: str, value: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `cut`: of `shape`, with zeros."""
        for dim, indices in self._kept(tensor, shape):
            whole = value.new_zeros(*value.shape[:dim], shape[dim], *value.shape[dim + 1 :])
            value = whole.index_copy(dim, indices, value)
        return value

    def _kept(self, tensor: str, shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
        port, _, leaf = tensor.rpartition(".")
        for dim, lost in self.gone.get(port, {}).items():
            if dim == 0 or leaf == "weight":
                yield dim, torch.tensor([i for i in range(shape[dim]) if i not in lost], dtype=torch.long)


def own_widths(model: nn.Module) -> Widths:
    """The widths that the blocks of `model` (its adapter merged in thought) need to compute what it computes."""
    modelmap, gone = bind(model), Gone()
    parts = axes(modelmap, ("heads",)) if modelmap.heads != modelmap.kv_heads else ()
    count = len(modelmap.blocks)
    heads, kv_heads, ffn = ([width] * count for width in (modelmap.heads, modelmap.kv_heads, 0))
    missing = []
    for axis in axes(modelmap, ("kv", "ffn")):
        block = axis.blocks[0]
        biased = modelmap[axis.name].bias
        silent = _silent(model, axis)
        # llama.cpp takes the width of a head from the first block, where it has any; and a bias is added at all events.
        least = 1 if biased or (axis.kind == "kv" and block == 0) else 0
        lost = silent[: axis.units - least]
        _add_(gone, axis, lost)
        left = axis.units - len(lost)
        if axis.kind == "ffn":
            ffn[block] = left
        else:
            kv_heads[block] = left
            heads[block] = left * (modelmap.heads // modelmap.kv_heads)
        if not left:
            missing.append(f"blk.{block}.{'ffn' if axis.kind == 'ffn' else 'attn'}_")
    for axis in parts:
        heads[axis.blocks[0]] -= _thin_(gone, model, axis)
    return Widths(tuple(heads), tuple(kv_heads), tuple(ffn), gone, tuple(missing))


def _thin_(gone: Gone, model: nn.Module, axis: Axis) -> int:
    """Leave out query heads inside the groups that stay, as many in each; how many went."""
    run, reader = axis.units // axis.buckets, axis.readers[0]
    out = gone.get(axis.name, {}).get(1, set())
    inside: list[list[int]] = [[] for _ in range(axis.buckets)]
    for unit in _silent(model, axis):
        inside[unit // run].append(unit)
    stay = [units for b, units in enumerate(inside) if not out.issuperset(reader.indices((b * run,)))]
    each = min((min(len(units), run - 1) for units in stay), default=0)
    _add_(gone, axis, [unit for units in stay for unit in units[:each]])
    return each * len(stay)


@torch.no_grad()
def _silent(model: nn.Module, axis: Axis) -> list[int]:
    """The units whose features are read with weights of zero."""
    module = base_of(model).get_submodule(axis.name)
    read = (merged_weight(module, plain(model)[axis.name]) != 0).any(0)
    size = axis.readers[0].size
    return (~read.view(-1, size).any(1)).nonzero().flatten().tolist()


def _add_(gone: Gone, axis: Axis, units: list[int]) -> None:
    for part in axis.parts if units else ():
        gone.setdefault(part.port, {}).setdefault(part.dim, set()).update(part.indices(units))
