"""Binding a family's facts to a model: every linear and embedding claimed once, or one error that names them all.

The map is made of names and numbers: it holds no module and no tensor, so it is the same for a model on `meta`, for one
whose linears were replaced (quantized, wrapped by PEFT) and for the plain one.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from peft import PeftModel
from torch import nn

from slimtune.arch.families import FAMILIES
from slimtune.arch.spec import Config, FamilySpec, NormKind, NormSpec, PortSpec, Space, Widths
from slimtune.errors import ShapeError, UnknownArchitecture, nearest

Kind = Literal["linear", "embedding"]
ADD_A_ROW = "docs/adding.md tells how to add a family: one row of facts in arch/families.py"
PEFT_CHILDREN = ("base_layer", "original_module")  # under which a PEFT layer keeps the module that it wraps


@runtime_checkable
class LinearLike(Protocol):
    """A linear: `nn.Linear`, or any module that stands for one."""

    in_features: int
    out_features: int


@runtime_checkable
class EmbeddingLike(Protocol):
    """An embedding: `nn.Embedding`, or any module that stands for one."""

    num_embeddings: int
    embedding_dim: int


@dataclass(frozen=True)
class Port:
    """A linear or an embedding of a model.

    `name` is its path in the plain model, whatever wraps it. An embedding reads `in_features` tokens or positions.
    `block` is an index into `ModelMap.blocks`; None outside the blocks, where `stage` says nothing. `tied_to` names the
    earlier port whose weight this one shares. `writes` has several spaces where a fused linear stacks them along
    `out_features`; `values` is the place among them of the values that attention averages.
    """

    name: str
    kind: Kind
    reads: Space
    writes: tuple[Space, ...]
    in_features: int
    out_features: int
    bias: bool
    block: int | None = None
    stage: int = 0
    tied_to: str | None = None
    values: int | None = None


@dataclass(frozen=True)
class Attention:
    """One attention of a block: the port that makes its values, where they lie among its outputs, and the port that
    reads what they are averaged to."""

    values: Port
    rows: slice
    output: Port


@dataclass(frozen=True)
class Norm:
    """A normalisation: before the ports it `feeds`, after the port it `follows`, or in the residual stream itself."""

    name: str
    kind: NormKind
    feeds: tuple[str, ...] = ()
    follows: str | None = None
    block: int | None = None


@dataclass(frozen=True)
class Block:
    """One block. `index` counts through all stacks, `stack` is the path of the `ModuleList` that holds it; `gated` is
    the path of its feed-forward layer where that is a gated one (`StackSpec.gated`), else empty."""

    name: str
    index: int
    stack: str
    ports: tuple[Port, ...]
    gated: str = ""

    @property
    def stages(self) -> tuple[tuple[Port, ...], ...]:
        """The ports in dataflow order, together where they share one input."""
        return tuple(tuple(ports) for _, ports in groupby(self.ports, key=lambda port: port.stage))


@dataclass(frozen=True)
class ModelMap:
    """Where everything in a model is, and how it is connected.

    `ports` are in dataflow order: what stands before the blocks, the blocks, what stands after them. `sizes` has the
    width of every space but `FOREIGN`; `widths` names the numbers of the configuration that say so. `epsilon` is what
    RMS norms add to the mean square (0 where there are none).
    """

    family: str
    ports: tuple[Port, ...]
    blocks: tuple[Block, ...]
    norms: tuple[Norm, ...]
    sizes: dict[Space, int]
    scaled_embeddings: bool = False
    widths: Widths = field(default_factory=Widths)
    epsilon: float = 0.0

    def __getitem__(self, name: str) -> Port:
        """The port called `name`. Raises `UnknownArchitecture` where there is none."""
        if name not in self._by_name:
            raise UnknownArchitecture(
                "the model has no such linear or embedding", got=name, remedy=nearest(name, self._by_name)
            )
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Port]:
        return {port.name: port for port in self.ports}

    @property
    def linears(self) -> tuple[Port, ...]:
        """The linears of the blocks: what "all-linear" means."""
        return tuple(port for block in self.blocks for port in block.ports if port.kind == "linear")

    @property
    def parts(self) -> tuple[int | None, ...]:
        """What can be in memory alone: what stands outside the blocks (None), and each block by its index."""
        return None, *(block.index for block in self.blocks)

    @property
    def heads(self) -> int:
        """Query heads of a block."""
        return self.sizes[Space.HEADS]

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.sizes[Space.HEAD] // self.heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads of a block."""
        return self.sizes[Space.KV_HEAD] // self.head_dim

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Every attention, in dataflow order: values go to the next port of their block that reads `HEAD`."""
        found = []
        for block in self.blocks:
            values: Port | None = None
            for port in block.ports:
                if port.values is not None:
                    values = port
                elif port.reads is Space.HEAD and values is not None and values.values is not None:
                    found.append(Attention(values, self.slices(values)[values.values][1], port))
                    values = None
        return tuple(found)

    def slices(self, port: Port) -> tuple[tuple[Space, slice], ...]:
        """The spaces that `port` writes, and the range of `out_features` that belongs to each."""
        ends = [port.out_features]
        if len(port.writes) > 1:
            ends = [sum(self.sizes[space] for space in port.writes[: i + 1]) for i in range(len(port.writes))]
        return tuple((s, slice(a, b)) for s, a, b in zip(port.writes, [0, *ends[:-1]], ends, strict=True))


def bind(model: nn.Module, family: FamilySpec | None = None) -> ModelMap:
    """The map of `model`, a Hugging Face model (plain, on `meta`, quantized or PEFT-wrapped).

    Args:
        model: the model; a PEFT model's base model is mapped, and the adapters belong to the ports they wrap.
        family: the row to bind; by default the one of the model's `model_type`.

    Raises:
        UnknownArchitecture: no family has the model's type, or the row and the model disagree on which modules there
            are: a module with weights that no one claims, one claimed twice, or one that is not there.
        ShapeError: a module's sizes are not those of the model's configuration.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Config = getattr(plain, "config", None)
    row = family or family_of(getattr(config, "model_type", type(plain).__name__))
    name = row.name
    if row.wraps:
        config = getattr(config, row.wraps)
        inner = family_of(config.model_type)
        row = replace(inner, trunk=row.trunk, entry=inner.entry + row.entry, foreign=inner.foreign + row.foreign)
    modules = dict(plain.named_modules(remove_duplicate=False))
    claims = _Claims(row, config, modules)
    _check_claimed_once(name, claims, modules)
    sizes = {space: size(config) for space, size in (row.sizes or {}).items()}
    ports = _tied(tuple(_port(claim, modules[claim.name]) for claim in claims.ports), modules)
    norms = tuple(_norm(claim, ports) for claim in claims.norms)
    _check_sizes(ports, norms, sizes, modules)
    blocks = tuple(
        Block(path, i, stack, tuple(port for port in ports if port.block == i), gated and _join(path, gated))
        for i, (path, stack, gated) in enumerate(claims.blocks)
    )
    epsilon = float(getattr(config, row.epsilon)) if any(norm.kind != "layer" for norm in norms) else 0.0
    return ModelMap(name, ports, blocks, norms, sizes, row.scaled_embeddings, row.widths, epsilon)


def family_of(model_type: str) -> FamilySpec:
    """The row for a `model_type`. Raises `UnknownArchitecture` where there is none."""
    for row in FAMILIES.values():
        if model_type in row.model_types:
            return row
    raise UnknownArchitecture(
        f"slimtune has no map of the architecture '{model_type}'",
        got=f"model_type '{model_type}'",
        wanted=f"one of {', '.join(sorted(t for row in FAMILIES.values() for t in row.model_types))}",
        remedy=ADD_A_ROW,
    )


Spec = TypeVar("Spec", PortSpec, NormSpec)


@dataclass(frozen=True)
class _Claim(Generic[Spec]):
    """A row's fact about one module of a model. `root` is what the paths inside the fact are relative to."""

    name: str
    spec: Spec
    root: str
    block: int | None = None


class _Claims:
    """All facts of a row, spelt out for the blocks that a model has."""

    def __init__(self, row: FamilySpec, config: Config, modules: dict[str, nn.Module]) -> None:
        self.blocks: list[tuple[str, str, str]] = []
        self.missing: list[str] = []
        self.foreign = tuple(_join(row.trunk, path) for path in row.foreign)
        self.ports = _claims(row.entry, config, row.trunk)
        self.norms = _claims(row.norms, config, row.trunk)
        for stack in row.stacks:
            path = _join(row.trunk, stack.blocks)
            children = [child for child, _ in modules[path].named_children()] if path in modules else []
            self.missing += [] if children else [path]
            for child in children:
                index, root = len(self.blocks), f"{path}.{child}"
                self.blocks.append((root, path, stack.gated))
                self.ports += _claims(sorted(stack.ports, key=lambda spec: spec.stage), config, root, index)
                self.norms += _claims(stack.norms, config, root, index)
        self.ports += _claims(row.exit, config, row.trunk)
        self.ports[:0] = [
            _Claim(name, PortSpec(name, Space.FOREIGN, (Space.FOREIGN,)), "")
            for name in _outermost(name for name, module in modules.items() if _face(module))
            if _is_below(name, self.foreign)
        ]


def _claims(specs: Iterable[Spec], config: Config, root: str, block: int | None = None) -> list[_Claim[Spec]]:
    return [_Claim(_join(root, spec.path), spec, root, block) for spec in specs if spec.when(config)]


def _join(root: str, path: str) -> str:
    if path.startswith("/"):
        return path[1:]
    return f"{root}.{path}" if root else path


def _is_below(name: str, roots: Iterable[str]) -> bool:
    """Whether `name` is one of `roots` or stands below one."""
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def _outermost(names: Iterable[str]) -> Iterator[str]:
    """Those of `names` (parents before children) that do not stand below another."""
    last = ""
    for name in names:
        if not last or not _is_below(name, (last,)):
            last = name
            yield name


def _wrapped(module: nn.Module) -> nn.Module:
    """The module that PEFT layers wrap, or the module itself."""
    children = dict(module.named_children())
    for child in PEFT_CHILDREN:
        if child in children:
            return _wrapped(children[child])
    return module


def _face(module: nn.Module) -> tuple[Kind, int, int] | None:
    """What a linear or embedding shows of itself: kind, in_features, out_features. None for any other module."""
    module = _wrapped(module)
    if isinstance(module, EmbeddingLike):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, LinearLike):
        return "linear", module.in_features, module.out_features
    return None


def _check_claimed_once(family: str, claims: _Claims, modules: dict[str, nn.Module]) -> None:
    """Every module with weights of its own stands at or below exactly one claim, and every claim has its module."""
    ports = [claim.name for claim in claims.ports]
    claimed = ports + [claim.name for claim in claims.norms]
    missing = claims.missing + [name for name in claimed if name not in modules]
    missing += [name for name in ports if name in modules and _face(modules[name]) is None]
    count = Counter(claimed)
    owners = {*claimed, *claims.foreign}
    twice = [name for name in count if count[name] > 1 or any(p in count for p in _parents(name))]
    unclaimed = [
        name or "the model itself"
        for name, module in modules.items()
        if (_face(module) or next(module.parameters(recurse=False), None) is not None)
        and owners.isdisjoint((name, *_parents(name)))
    ]
    faults = {"not described by the row": unclaimed, "described twice": twice, "not in the model": missing}
    if any(faults.values()):
        raise UnknownArchitecture(
            f"the model is not what the family '{family}' describes",
            got="; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names),
            wanted="every module with weights described exactly once",
            remedy=ADD_A_ROW,
        )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _port(claim: _Claim[PortSpec], module: nn.Module) -> Port:
    face, spec = _face(module), claim.spec
    assert face is not None  # _check_claimed_once found it
    bias = getattr(_wrapped(module), "bias", None) is not None
    kind, in_features, out_features = face
    return Port(
        claim.name,
        kind,
        spec.reads,
        spec.writes,
        in_features,
        out_features,
        bias,
        block=claim.block,
        stage=spec.stage,
        values=spec.values,
    )


def _tied(ports: tuple[Port, ...], modules: dict[str, nn.Module]) -> tuple[Port, ...]:
    """The ports with `tied_to` filled in: ties are found by the weight itself, since a configuration's flag can lie."""
    first: dict[int, str] = {}
    found = []
    for port in ports:
        weight = dict(_wrapped(modules[port.name]).named_parameters(recurse=False)).get("weight")
        owner = port.name if weight is None else first.setdefault(id(weight), port.name)
        found.append(port if owner == port.name else replace(port, tied_to=owner))
    return tuple(found)


def _norm(claim: _Claim[NormSpec], ports: tuple[Port, ...]) -> Norm:
    """The norm with its neighbours by name."""
    spec, names = claim.spec, [port.name for port in ports]
    feeds = [name for path in spec.feeds for name in fnmatch.filter(names, _join(claim.root, path))]
    follows = _join(claim.root, spec.follows) if spec.follows else None
    return Norm(claim.name, spec.kind, tuple(feeds), follows, claim.block)


def _check_sizes(
    ports: tuple[Port, ...], norms: tuple[Norm, ...], sizes: dict[Space, int], modules: dict[str, nn.Module]
) -> None:
    faults: list[tuple[str, str, str]] = []

    def check(name: str, what: str, got: int, spaces: tuple[Space, ...], wanted: int) -> None:
        if got != wanted:
            faults.append((name, f"{what} {got}", f"{wanted} ({' + '.join(space.value for space in spaces)})"))

    for port in ports:
        if port.reads is not Space.FOREIGN:
            check(port.name, "in_features", port.in_features, (port.reads,), sizes[port.reads])
        if Space.FOREIGN not in port.writes:
            wanted = sum(sizes[space] for space in port.writes)
            check(port.name, "out_features", port.out_features, port.writes, wanted)
    writes = {port.name: port.writes[0] for port in ports}
    for norm in norms:
        space = writes[norm.follows] if norm.follows else Space.RESIDUAL
        of_a_head = space in (Space.HEAD, Space.KV_HEAD)
        wanted = sizes[Space.HEAD] // sizes[Space.HEADS] if of_a_head else sizes[space]
        for leaf, weight in _wrapped(modules[norm.name]).named_parameters(recurse=False):
            check(norm.name, leaf, weight.numel(), (space,), wanted)
    if faults:
        raise ShapeError(
            "the sizes of the model's modules are not those of its configuration",
            where=", ".join(dict.fromkeys(name for name, _, _ in faults)),
            got="; ".join(f"{name} has {got}" for name, got, _ in faults),
            wanted="; ".join(f"{name} {wanted}" for name, _, wanted in faults),
            remedy="load the configuration that belongs to the weights",
        )
