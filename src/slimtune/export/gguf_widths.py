"""Blocks of different widths in a GGUF file: units that are all zeros are left out.

A configuration of transformers has one width for all blocks, so a model pruned with `widths: allocated`, or of whole
sub-layers, has zeros where the units that went were read (`slimtune.prune.surgery`). llama.cpp's `deci` computes what
its `llama` does with heads and FFN channels counted for each block: no heads included, but not no channels (it then
leaves out the block's attention as well, and fails where that is the last), so one of those stays.
"""

from __future__ import annotations

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

    def kept(self, tensor: str, dim: int, size: int) -> Tensor | None:
        """The indices that stay of one dimension of the tensor called `tensor`; None where all do."""
        port, _, leaf = tensor.rpartition(".")
        lost = self.gone.get(port, {}).get(dim)
        if lost is None or (dim == 1 and leaf != "weight"):
            return None
        return torch.tensor([i for i in range(size) if i not in lost], dtype=torch.long)


def own_widths(model: nn.Module) -> Widths:
    """The widths that the blocks of `model` (its adapter merged in thought) need to compute what it computes."""
    modelmap, gone, modules = bind(model), Gone(), plain(model)
    count = len(modelmap.blocks)
    heads, kv_heads, ffn = ([width] * count for width in (modelmap.heads, modelmap.kv_heads, 0))
    inside = axes(modelmap, ("heads",)) if modelmap.heads != modelmap.kv_heads else ()
    thin = {axis.name: axis for axis in inside}
    missing = []
    for axis in axes(modelmap, ("kv", "ffn")):
        block = axis.blocks[0]
        read = read_features(base_of(model).get_submodule(axis.name), modules[axis.name])
        silent = silent_units(read, axis)
        # llama.cpp takes the width of a head from the first block, where it has any; and a bias is added at all events.
        least = 1 if axis.kind == "ffn" or modelmap[axis.name].bias or block == 0 else 0
        lost = silent[: axis.units - least]
        _add_(gone, axis, lost)
        left = axis.units - len(lost)
        if axis.kind == "ffn":
            ffn[block] = left
            continue
        kv_heads[block], heads[block] = left, left * (modelmap.heads // modelmap.kv_heads)
        if axis.name in thin:
            heads[block] -= _thin_(gone, thin[axis.name], read)
        if not left:
            missing.append(f"blk.{block}.attn_")
    return Widths(tuple(heads), tuple(kv_heads), tuple(ffn), gone, tuple(missing))


def _thin_(gone: Gone, axis: Axis, read: Tensor) -> int:
    """Leave out query heads inside the groups that stay, as many in each; how many went."""
    run, reader = axis.units // axis.buckets, axis.readers[0]
    out = gone.get(axis.name, {}).get(1, set())
    inside: list[list[int]] = [[] for _ in range(axis.buckets)]
    for unit in silent_units(read, axis):
        inside[unit // run].append(unit)
    stay = [units for b, units in enumerate(inside) if not out.issuperset(reader.indices((b * run,)))]
    each = min((min(len(units), run - 1) for units in stay), default=0)
    _add_(gone, axis, [unit for units in stay for unit in units[:each]])
    return each * len(stay)


def read_features(module: nn.Module, layer: nn.Module) -> Tensor:
    """Which features are read with weights other than zero: bool `[in]`."""
    return (merged_weight(module, layer) != 0).any(0)


def silent_units(read: Tensor, axis: Axis) -> list[int]:
    """The units none of whose features are read."""
    silent: list[int] = (~read.view(-1, axis.readers[0].size).any(1)).nonzero().flatten().tolist()
    return silent


def _add_(gone: Gone, axis: Axis, units: list[int]) -> None:
    for part in axis.parts if units else ():
        gone.setdefault(part.port, {}).setdefault(part.dim, set()).update(part.indices(units))
