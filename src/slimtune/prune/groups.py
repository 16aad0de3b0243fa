"""What can be cut out of a model without leaving a dangling dimension: read off its map.

A sub-layer is a run of ports that write an inner space (heads, or the inside of a feed-forward layer) and the port that
reads it. Its **axis** is that inner space in units: an FFN channel, a query head, or a KV group (a key-value head with
the query heads it serves). Cutting a unit takes rows out of the writers and columns out of the reader; what remains
computes what the model computed with that unit's columns at zero.

Example:
    >>> part = Part("o", 1, start=0, size=2)
    >>> part.indices((0, 2))
    (0, 1, 4, 5)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slimtune.arch import Block, ModelMap, Port, Space
from slimtune.errors import RecipeError
from slimtune.prune.importance import Side

Kind = Literal["kv", "heads", "ffn", "layers"]
Target = Literal["kv", "heads", "ffn", "layers", "sublayers"]
Kept = dict[str, tuple[int, ...]]
"""The units of each axis that stay, in order, by the axis's name."""

INNER = (Space.HEAD, Space.FFN)


@dataclass(frozen=True)
class Part:
    """The share of one port in every unit: unit `u` is `size` indices of `dim` from `start + u * size` on.

    `dim` is 0 for what the port writes (rows of a linear's weight) and 1 for what it reads (its columns).
    """

    port: str
    dim: int
    start: int
    size: int

    @property
    def side(self) -> Side:
        """What the port does with the space."""
        return "reads" if self.dim == 1 else "writes"

    def indices(self, units: Iterable[int]) -> tuple[int, ...]:
        """The indices of these units, in the order given."""
        return tuple(self.start + unit * self.size + i for unit in units for i in range(self.size))


@dataclass(frozen=True)
class Slice:
    """Indices of one dimension of one port."""

    port: str
    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Slices that can only go together, and the parameters that go with them."""

    axis: str
    unit: int
    slices: tuple[Slice, ...]
    parameters: int


@dataclass(frozen=True)
class Axis:
    """An inner space in units that can be cut.

    Attributes:
        name: the port that reads the space (the first one, where blocks must lose the same units); a stack's path for
            whole layers, which have no parts.
        kind: what a unit is.
        blocks: the blocks it belongs to.
        units: how many there are.
        parts: what a unit has of each port.
        parameters: those of one unit.
        buckets: units stand in this many equal runs, which must lose equally many (query heads of a KV group).
        whole: all units go together, or none: a sub-layer.
    """

    name: str
    kind: Kind
    blocks: tuple[int, ...]
    units: int
    parts: tuple[Part, ...]
    parameters: int
    buckets: int = 1
    whole: bool = False

    @property
    def readers(self) -> tuple[Part, ...]:
        """The parts that read the space."""
        return tuple(part for part in self.parts if part.dim == 1)

    def group(self, unit: int) -> Group:
        """One unit, spelt out."""
        slices = (Slice(part.port, part.dim, part.indices((unit,))) for part in self.parts)
        return Group(self.name, unit, tuple(slices), self.parameters)


def axes(modelmap: ModelMap, targets: Sequence[Target] = ("kv", "ffn")) -> tuple[Axis, ...]:
    """The axes of the kinds named in `targets`, in the order of the blocks. `sublayers` are all of attention and of
    feed-forward layers, each to go or stay as a whole.

    `heads` cuts query heads evenly inside KV groups, and is `kv` where every query head has its own keys and values.
    Blocks whose heads share position biases (T5's self-attention) are one axis: they lose the same heads.

    Raises `RecipeError` when the model has nothing of these kinds to cut, with the reason.
    """
    found = list(_layers(modelmap)) if "layers" in targets else []
    whole = "sublayers" in targets
    if whole:
        targets = ("kv", "ffn")
    runs = [(block, i, run) for block in modelmap.blocks for i, run in enumerate(_sublayers(block))]
    shared = dict(_shared(modelmap, runs))
    made: dict[str, list[tuple[int, tuple[Part, ...]]]] = {}
    for block, place, (*writers, reader) in runs:
        space = reader.reads
        if (space is Space.FFN and "ffn" in targets) or (space is Space.HEAD and {"kv", "heads"} & set(targets)):
            name, more = shared.get((block.stack, place), (reader.name, ()))
            parts = tuple(_parts(modelmap, writers, reader, _whole(modelmap, targets)))
            members = made.setdefault(name, [])
            members.append((block.index, parts if members else (*parts, *more)))
    attention: Kind = "kv" if "kv" in targets else "heads"
    for name, members in made.items():
        parts = tuple(part for _, mine in members for part in mine)
        first = next(part for part in parts if part.dim == 1)
        kind: Kind = "ffn" if modelmap[first.port].reads is Space.FFN else attention
        if kind != "ffn" and not modelmap.widths.head_width and not whole:
            continue  # the configuration derives the width of a head from their number
        units = modelmap[first.port].in_features // first.size
        buckets = 1 if kind != "heads" or _whole(modelmap, targets) else modelmap.kv_heads
        cost = sum(_parameters(modelmap[part.port], part) for part in parts)
        found.append(Axis(name, kind, tuple(block for block, _ in members), units, parts, cost, buckets, whole))
    missing = set(targets) - {axis.kind for axis in found}
    if missing:
        raise RecipeError(
            "the model has no prunable groups of this kind",
            where="targets",
            got=", ".join(sorted(missing)),
            wanted=f"{modelmap.family} can lose: {', '.join(possible(modelmap)) or 'nothing'}",
        )
    return tuple(found)


def block_parameters(modelmap: ModelMap, block: int) -> int:
    """Parameters of one block: its linears with their biases, and its norms."""
    ports = sum(_port_parameters(port) for port in modelmap.blocks[block].ports)
    return ports + sum(_norm_parameters(modelmap, norm.name) for norm in modelmap.norms if norm.block == block)


def parameters(modelmap: ModelMap, of: Literal["blocks", "model"]) -> int:
    """Parameters of all blocks, or of the whole model (tied weights once; foreign parts left out)."""
    inside = sum(block_parameters(modelmap, block.index) for block in modelmap.blocks)
    if of == "blocks":
        return inside
    ports = (p for p in modelmap.ports if p.block is None and p.tied_to is None and p.reads is not Space.FOREIGN)
    norms = (norm.name for norm in modelmap.norms if norm.block is None)
    return inside + sum(map(_port_parameters, ports)) + sum(_norm_parameters(modelmap, name) for name in norms)


def possible(modelmap: ModelMap) -> list[Kind]:
    """The kinds of units that the model can lose."""
    spaces = {port.reads for port in modelmap.linears}
    heads: list[Kind] = ["kv", "heads"] if modelmap.widths.head_width and Space.HEAD in spaces else []
    ffn: list[Kind] = ["ffn"] if Space.FFN in spaces else []
    layers: list[Kind] = ["layers"] if any(_layers(modelmap)) else []
    return heads + ffn + layers


def _stacks(modelmap: ModelMap) -> list[str]:
    return list(dict.fromkeys(block.stack for block in modelmap.blocks))


def _layers(modelmap: ModelMap) -> Iterator[Axis]:
    """Whole blocks, stack by stack, where those of a stack are equal."""
    for stack in _stacks(modelmap):
        blocks = tuple(block.index for block in modelmap.blocks if block.stack == stack)
        costs = {block_parameters(modelmap, block) for block in blocks}
        if len(costs) == 1 and len(blocks) > 1:
            yield Axis(stack, "layers", blocks, len(blocks), (), costs.pop())


def _sublayers(block: Block) -> Iterator[list[Port]]:
    """Runs of ports that end with the one that reads the inner space the others write."""
    run: list[Port] = []
    for port in block.ports:
        run.append(port)
        if port.reads in INNER:
            yield run
            run = []


def _whole(modelmap: ModelMap, targets: Sequence[Target]) -> bool:
    """Whether a unit of attention takes its keys and values along."""
    return "kv" in targets or modelmap.heads == modelmap.kv_heads


def _parts(modelmap: ModelMap, writers: Sequence[Port], reader: Port, whole: bool) -> Iterator[Part]:
    size = 1
    if reader.reads is Space.HEAD:
        size = modelmap.head_dim * (modelmap.heads // modelmap.kv_heads if whole else 1)
    for writer in writers:
        for space, rows in modelmap.slices(writer):
            if space is reader.reads:
                yield Part(writer.name, 0, rows.start, size)
            elif space is Space.KV_HEAD and whole:
                yield Part(writer.name, 0, rows.start, modelmap.head_dim)
    yield Part(reader.name, 1, 0, size)


Runs = Sequence[tuple[Block, int, list[Port]]]


def _shared(modelmap: ModelMap, runs: Runs) -> Iterator[tuple[tuple[str, int], tuple[str, tuple[Part, ...]]]]:
    """Sub-layers that read one position bias a head: (stack, place in the block) -> (axis name, the bias's part)."""
    for port in modelmap.ports:
        if port.writes == (Space.HEADS,):
            parent = port.name.rpartition(".")[0]
            for block, place, run in runs:
                if run[-1].name.rpartition(".")[0] == parent:
                    yield (block.stack, place), (run[-1].name, (Part(port.name, 0, 0, 1),))


def _parameters(port: Port, part: Part) -> int:
    return part.size * (port.out_features if part.dim == 1 else port.in_features + port.bias)


def _port_parameters(port: Port) -> int:
    return port.out_features * (port.in_features + port.bias)


def _norm_parameters(modelmap: ModelMap, name: str) -> int:
    norm = next(norm for norm in modelmap.norms if norm.name == name)
    space = modelmap[norm.follows].writes[0] if norm.follows else Space.RESIDUAL
    width = modelmap.head_dim if space in (Space.HEAD, Space.KV_HEAD) else modelmap.sizes[space]
    return width * (2 if norm.kind == "layer" else 1)
