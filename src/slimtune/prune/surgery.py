"""Cutting units out of a model in place: the only mutation in `prune`.

Weights, biases, LoRA factors and the optimizer's state lose the same rows and columns; the model's configuration and
its modules' own counts are brought in line. Parameters keep their identity, so an optimizer goes on with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Port, Space
from slimtune.errors import RecipeError, ShapeError
from slimtune.prune.groups import Axis, Kept, parameters
from slimtune.prune.state import cut_state_
from slimtune.prune.weights import Follower, Packed, base_layer, factors, held, lengths

COUNTS = {
    "heads": ("num_heads", "n_heads", "num_attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "queries_per_key": ("num_key_value_groups",),
    "inner": ("inner_dim",),
    "ffn": ("intermediate_size",),
}
"""What modules call their own counts, in transformers. Those that are there are brought in line."""


@dataclass(frozen=True)
class AxisFact:
    """What one axis lost. `real` is below the number kept where zeros stand for units that went (see `padded`)."""

    name: str
    kind: str
    units: int
    kept: int
    real: int


@dataclass(frozen=True)
class Requantized:
    """A packed layer whose columns could not be cut as they lie, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PruneFacts:
    """What `prune_` did. Parameters are counted on the model; where `padded`, zeros that stand for units that went are
    counted as gone in `removed_ratio`, though they take their place in the file."""

    ratio: float
    of: str
    removed_ratio: float
    parameters_before: int
    parameters_after: int
    padded: bool
    axes: tuple[AxisFact, ...]
    requantized: tuple[Requantized, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for `report.json`."""
        return asdict(self)


@dataclass(frozen=True)
class PrunePlan:
    """Which units stay, and what was asked for. Made by `select`; `of` is what `ratio` is a share of."""

    axes: tuple[Axis, ...]
    kept: Kept
    ratio: float = 0.0
    of: str = "blocks"


Indices = dict[int, list[int]]
"""Indices to keep, by dimension of a port (0 what it writes, 1 what it reads)."""


def require_cuttable(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Raise `ShapeError` where a layer that pruning would cut is none that can be cut: before any work."""
    for name in dict.fromkeys(part.port for axis in axes for part in axis.parts):
        layer = base_layer(model.get_submodule(name))
        if not isinstance(layer, nn.Linear | nn.Embedding | Packed):
            raise ShapeError(
                "a layer cannot be pruned",
                where=name,
                got=type(layer).__name__,
                wanted="a linear, dense or packed by slimtune",
            )


@torch.no_grad()
def prune_(
    model: nn.Module,
    modelmap: ModelMap,
    plan: PrunePlan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> PruneFacts:
    """Cut `model` down to the units that `plan` keeps, in place.

    Args:
        model: a Hugging Face model without its `PeftModel`; the layers inside may be wrapped by adapters or packed.
        modelmap: its map as it is now.
        plan: the units to keep.
        optimizer: whose state goes along.

    Blocks that would keep fewer units than others of their kind are padded to the widest: some that went stay, with
    zeros where they are read, since a configuration knows one width; so do all of a sub-layer that goes. Raises
    `ShapeError` when a layer cannot be cut, `RecipeError` when padding would have to write zeros into packed weights.
    """
    require_cuttable(model, plan.axes)
    total = "model" if plan.of == "model" else "blocks"
    before, whole = parameters(modelmap, "model"), parameters(modelmap, cast(Any, total))
    by_name = {axis.name: axis for axis in plan.axes}
    removed = sum(axis.parameters * (axis.units - len(plan.kept[axis.name])) for axis in plan.axes)
    wide, padded = _padded(plan)
    for name, silent in padded.items():
        for part in by_name[name].readers:
            _silence_(model.get_submodule(part.port), part.port, part.indices(silent))
    requantized = []
    for name, keep in _per_port(modelmap, plan.axes, wide).items():
        for reason in _cut_(model, modelmap[name], keep, optimizer):
            requantized.append(Requantized(name, reason))
    _tell_(model, modelmap, plan.axes, wide)
    layers = [axis for axis in plan.axes if axis.kind == "layers"]
    for axis in layers:
        _drop_blocks_(model, modelmap, axis, wide[axis.name])
    _resize_(model, modelmap, plan.axes, wide)
    cut = sum(axis.parameters * (axis.units - len(wide[axis.name])) for axis in plan.axes)
    facts = tuple(
        AxisFact(axis.name, axis.kind, axis.units, len(wide[axis.name]), len(plan.kept[axis.name]))
        for axis in plan.axes
    )
    return PruneFacts(plan.ratio, total, removed / whole, before, before - cut, bool(padded), facts, tuple(requantized))


def _padded(plan: PrunePlan) -> tuple[Kept, dict[str, tuple[int, ...]]]:
    """The units to keep when all axes of a kind are as wide as the widest, and those of them that are to be silent."""
    width: dict[str, int] = {}
    for axis in plan.axes:
        width[axis.kind] = max(width.get(axis.kind, 0), axis.units if axis.whole else len(plan.kept[axis.name]))
    wide, silent = {}, {}
    for axis in plan.axes:
        kept = plan.kept[axis.name]
        run = axis.units // axis.buckets
        missing = (width[axis.kind] - len(kept)) // axis.buckets if axis.parts else 0
        rest = [[u for u in range(b * run, (b + 1) * run) if u not in set(kept)] for b in range(axis.buckets)]
        more = tuple(unit for units in rest for unit in units[:missing])
        wide[axis.name] = tuple(sorted(kept + more))
        if more:
            silent[axis.name] = more
    return wide, silent


def _per_port(modelmap: ModelMap, axes: Sequence[Axis], kept: Kept) -> dict[str, Indices]:
    """What every port keeps of each dimension; a dimension that is not named stays whole."""
    gone: dict[str, dict[int, set[int]]] = {}
    for axis in axes:
        lost = sorted(set(range(axis.units)) - set(kept[axis.name]))
        for part in axis.parts:
            gone.setdefault(part.port, {}).setdefault(part.dim, set()).update(part.indices(lost))
    keep: dict[str, Indices] = {}
    for name, dims in gone.items():
        sizes = (modelmap[name].out_features, modelmap[name].in_features)
        keep[name] = {dim: [i for i in range(sizes[dim]) if i not in lost] for dim, lost in dims.items() if lost}
    return {name: dims for name, dims in keep.items() if dims}


def _cut_(model: nn.Module, port: Port, keep: Indices, optimizer: torch.optim.Optimizer | None) -> list[str]:
    """Cut one port; returns why its weight was quantized again, if it was."""
    module = model.get_submodule(port.name)
    rows, columns = (None if dim not in keep else torch.tensor(keep[dim]) for dim in (0, 1))
    reasons, before = [], lengths(module)
    layer = base_layer(module)
    if isinstance(layer, nn.Embedding):
        assert rows is not None, "an embedding's tokens are not pruned"
        _shrink_(layer.weight, 1, rows, optimizer)
        layer.embedding_dim = len(rows)
    elif isinstance(layer, Packed):
        smaller, reason = layer.select(rows, columns)
        reasons = [reason] if reason else []
        _replace_(model, module, port.name, smaller)
    else:
        assert isinstance(layer, nn.Linear)  # as prune_ has found
        _cut_linear_(layer, rows, columns, optimizer)
    for a, b, _, magnitude in factors(module):
        _cut_linear_(a, None, columns, optimizer)
        _cut_linear_(b, rows, None, optimizer)
        if magnitude is not None and rows is not None:
            _shrink_(magnitude, 0, rows, optimizer)
    _stretch_(module, [length if length is None or rows is None else length[rows] for length in before])
    if layer is not module:
        sizes = base_layer(model.get_submodule(port.name))
        cast(Any, module).in_features, cast(Any, module).out_features = sizes.in_features, sizes.out_features
    return reasons


def _cut_linear_(
    linear: nn.Module, rows: Tensor | None, columns: Tensor | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Cut a linear, or a factor of which a part may be frozen."""
    for tensor in held(linear):
        if rows is not None:
            _shrink_(tensor, 0, rows, optimizer)
        if columns is not None and tensor.ndim > 1:
            _shrink_(tensor, 1, columns, optimizer)
    for name, kept in (("out_features", rows), ("in_features", columns)):
        if kept is not None and name in vars(linear):
            setattr(linear, name, len(kept))


def _stretch_(module: nn.Module, before: Sequence[Tensor | None]) -> None:
    """Leave rows of DoRA adapters the share of their length `before` that is left: it divides by what is left."""
    for (*_, magnitude), was, now in zip(factors(module), before, lengths(module), strict=True):
        if magnitude is not None and was is not None and now is not None:
            magnitude.mul_(torch.where(was > 0, now / was, 1).to(magnitude.dtype))


def _shrink_(tensor: Tensor, dim: int, indices: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Keep these indices of a parameter or buffer, and of what an optimizer holds of it."""
    indices, shape = indices.to(tensor.device), tensor.shape
    tensor.grad = None
    tensor.data = tensor.data.index_select(dim, indices)
    if optimizer is not None:
        cut_state_(optimizer, tensor, shape, dim, indices)


def _replace_(model: nn.Module, module: nn.Module, name: str, layer: nn.Module) -> None:
    if base_layer(module) is module:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    else:
        owner = module
        while base_layer(owner.get_submodule("base_layer")) is not owner.get_submodule("base_layer"):
            owner = owner.get_submodule("base_layer")
        cast(Any, owner).base_layer = layer


def _silence_(module: nn.Module, name: str, columns: Sequence[int]) -> None:
    """Put zeros where a layer reads these features."""
    layer = base_layer(module)
    if not isinstance(layer, nn.Linear):
        raise RecipeError(
            "packed weights cannot be padded with zeros", where=name, remedy="use widths: uniform, or prune first"
        )
    before = lengths(module)
    layer.weight[:, list(columns)] = 0
    for a, *_ in factors(module):
        for tensor in held(a):
            tensor[:, list(columns)] = 0
    _stretch_(module, before)


def _tell_(model: nn.Module, modelmap: ModelMap, axes: Sequence[Axis], kept: Kept) -> None:
    """Let the modules that follow what is cut know what stays."""
    rows = {name: dims[0] for name, dims in _per_port(modelmap, axes, kept).items() if 0 in dims}
    lost = {
        axis.blocks[unit]
        for axis in axes
        if axis.kind == "layers"
        for unit in set(range(axis.units)) - set(kept[axis.name])
    }
    blocks = {block.index for block in modelmap.blocks} - lost
    for module in [module for module in model.modules() if isinstance(module, Follower)]:
        module.follow_(model, modelmap, rows, blocks)


def _drop_blocks_(model: nn.Module, modelmap: ModelMap, axis: Axis, kept: Sequence[int]) -> None:
    """Take blocks out of their stack. Position biases that the first block computes for all go to the one that is
    first now."""
    stack = model.get_submodule(axis.name)
    assert isinstance(stack, nn.ModuleList)
    for port in modelmap.ports:
        if port.writes == (Space.HEADS,) and port.name.startswith(f"{axis.name}.0."):
            parent, _, leaf = port.name.removeprefix(f"{axis.name}.0.").rpartition(".")
            old, new = (stack[index].get_submodule(parent) for index in (0, kept[0]))
            setattr(new, leaf, getattr(old, leaf))
            cast(Any, new).has_relative_attention_bias = True
    for index in sorted(set(range(axis.units)) - set(kept), reverse=True):
        del stack[index]
    for index, block in enumerate(stack):
        for module in block.modules():
            if "layer_idx" in vars(module):
                cast(Any, module).layer_idx = index


def _resize_(model: nn.Module, modelmap: ModelMap, axes: Sequence[Axis], kept: Kept) -> None:
    """Bring the configuration and the modules' own counts in line with the weights."""
    config, widths = cast(Any, model).config.get_text_config(), modelmap.widths
    heads, kv_heads, ffn = modelmap.heads, modelmap.kv_heads, modelmap.sizes.get(Space.FFN, 0)
    for axis in axes:
        share = len(kept[axis.name]) / axis.units
        if axis.kind == "layers":
            stacks = list(dict.fromkeys(block.stack for block in modelmap.blocks))
            _shorten_(config, widths.blocks[stacks.index(axis.name)], kept[axis.name], axis.units)
        elif axis.kind == "ffn":
            ffn = round(modelmap.sizes[Space.FFN] * share)
        else:
            heads = round(modelmap.heads * share)
            alone = axis.kind == "heads" and modelmap.heads > modelmap.kv_heads  # queries go, keys and values stay
            kv_heads = kv_heads if alone else round(modelmap.kv_heads * share)
    if widths.head_width:
        setattr(config, widths.head_width, modelmap.head_dim)
        setattr(config, widths.heads, heads)
        if widths.kv_heads:
            setattr(config, widths.kv_heads, kv_heads)
    setattr(config, widths.ffn, ffn)
    values = {
        "heads": heads,
        "kv_heads": kv_heads,
        "queries_per_key": heads // kv_heads,
        "inner": heads * modelmap.head_dim,
        "ffn": ffn,
    }
    owners = {part.port.rpartition(".")[0] for axis in axes for part in axis.parts}
    for owner in owners:
        module = model.get_submodule(owner)
        own = vars(module)
        for fact, names in COUNTS.items():
            for name in set(names) & set(own):
                setattr(module, name, values[fact])


def _shorten_(config: Any, name: str, kept: Sequence[int], before: int) -> None:
    """Fewer blocks in the configuration, in its lists of one entry a block as well."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before and key.startswith("layer"):
            setattr(config, key, [value[i] for i in kept])
    setattr(config, name, len(kept))
