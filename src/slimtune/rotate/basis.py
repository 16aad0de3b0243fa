"""The basis a rotated model lives in: which parts were turned and how, and what that means at each of its ports.

In the residual stream `x` becomes `x R1`, in each head of the values `v` becomes `v R2`, and before the last linear of
a feed-forward layer, where that is asked for, `h` becomes `h R4` (the names are those of SpinQuant, arXiv 2405.16406).
The gains of the norms move into the linears that read what they scale. Where inputs turn online there is no R1, and of
the gains only that part moves that balances channels (`slimtune.rotate.balance`); so may channels behind a gate.

A weight, the factors of an adapter and a bias change by the same two maps, one on the input side and one on the output
side: `W' = write(read(W))`, `A' = read(A)`, `B' = write(B)`, `b' = write(b)`. Both have inverses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from slimtune.arch import Block, ModelMap, Port, Space
from slimtune.errors import FormatError, ShapeError
from slimtune.rotate.options import Rotation
from slimtune.rotate.turn import Turn, dense_turn, hadamard_turn, level, orthogonal_turn

RESIDUAL = "residual"


@dataclass(frozen=True)
class Basis:
    """What a rotation made of a model: its construction, what was turned, and the gains that were folded.

    `attentions` counts the values that are turned, `gains` are by the names of their norms, and `learned` has the
    matrices that no seed gives: float64 `residual` `[width, width]` and `values.N` `[kv_heads, head_dim, head_dim]`.
    `scales` are by the names of the last linears of gated feed-forward layers: what multiplies the channels they read.
    Where the model lost attentions or heads later, `kept` has for each attention that it has the number which that had
    in the beginning, and those of its then `kv_heads` key-value heads that are left; empty where it lost none.
    """

    rotation: Rotation
    width: int
    kv_heads: int
    head_dim: int
    attentions: int
    residual: bool
    level: bool
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    kept: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def balanced(self) -> int:
        """Places whose channels were scaled: norms, where inputs turn online, and feed-forward layers."""
        norms = 0 if self.rotation.folds or not self.rotation.balance else len(self.gains)
        return norms + len(self.scales)

    @cached_property
    def residual_turn(self) -> Turn:
        """R1."""
        turn = self._turn(RESIDUAL, self.width, 1, self.rotation.seed)
        return level(turn) if self.level else turn

    @cached_property
    def inputs_turn(self) -> Turn:
        """That of what reads the residual stream, online: a Hadamard transform whatever the kind of R2."""
        return hadamard_turn(self.width, generator=torch.Generator().manual_seed(self.rotation.seed))

    def values_turn(self, number: int) -> Turn:
        """R2 of the attention of this number: another turn for each key-value head."""
        first, heads = self._origin(number)
        return self._turn(f"values.{first}", self.head_dim, self.kv_heads, self.rotation.seed + 1 + first).of(heads)

    def _origin(self, number: int) -> tuple[int, tuple[int, ...]]:
        """The number that an attention had in the beginning, and which of its key-value heads are left."""
        return self.kept[number] if self.kept else (number, tuple(range(self.kv_heads)))

    def cut(self, modelmap: ModelMap, rows: Mapping[str, Collection[int]], blocks: Collection[int]) -> Basis:
        """The basis of the model when no more is left of it than these `blocks`, by index, and these `rows` of ports by
        name (all of a port that is not named). `modelmap` is that of the model before."""
        kept: list[tuple[int, tuple[int, ...]]] = []
        for number, attention in enumerate(modelmap.attentions[: self.attentions]):
            port, start, stop = attention.values, attention.rows.start, attention.rows.stop
            left = set(rows.get(port.name, range(stop))).intersection(range(start, stop, self.head_dim))
            first, heads = self._origin(number)
            if port.block in blocks:
                kept.append((first, tuple(heads[(row - start) // self.head_dim] for row in sorted(left))))
        whole = [(number, tuple(range(self.kv_heads))) for number in range(len(kept))]
        names = {f"values.{first}" for first, _ in kept} | {RESIDUAL}
        return replace(
            self,
            attentions=len(kept),
            gains=dict(self._gains_left(modelmap, blocks)),
            scales=dict(self._scales_left(modelmap, rows, blocks)),
            learned={name: matrix for name, matrix in self.learned.items() if name in names},
            kept=() if kept == whole else tuple(kept),
        )

    def _gains_left(self, modelmap: ModelMap, blocks: Collection[int]) -> Iterator[tuple[str, Tensor]]:
        """The gains under the names that their norms have when `blocks` are left, which are counted anew."""
        places: Counter[str] = Counter()
        for norm in modelmap.norms:
            if norm.name in self.gains and norm.block is None:
                yield norm.name, self.gains[norm.name]
        for block in modelmap.blocks:
            if block.index in blocks:
                for norm in modelmap.norms:
                    if norm.name in self.gains and norm.block == block.index:
                        leaf = norm.name.removeprefix(block.name)
                        yield f"{block.stack}.{places[block.stack]}{leaf}", self.gains[norm.name]
                places[block.stack] += 1

    def _scales_left(
        self, modelmap: ModelMap, rows: Mapping[str, Collection[int]], blocks: Collection[int]
    ) -> Iterator[tuple[str, Tensor]]:
        """The scales of the channels that are left, under the names that their linears have then."""
        places: Counter[str] = Counter()
        for block in modelmap.blocks:
            if block.index not in blocks:
                continue
            for value, last in gates(block):
                if last.name in self.scales:
                    scale = self.scales[last.name]
                    left = sorted(rows.get(value.name, range(len(scale))))
                    yield f"{block.stack}.{places[block.stack]}{last.name.removeprefix(block.name)}", scale[left]
            places[block.stack] += 1

    def _turn(self, name: str, width: int, heads: int, seed: int) -> Turn:
        if name in self.learned:
            return dense_turn(self.learned[name].view(heads, width, width))
        make = orthogonal_turn if self.rotation.kind == "orthogonal" else hadamard_turn
        return make(width, heads=heads, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Change:
    """What a change of basis does at one port: a gain and turns of its input, a scale and turns of parts of its output.

    The last of the turns of the input may be the port's `online` one, which the input meets in the model.
    """

    gain: Tensor | None = None
    reads: tuple[Turn, ...] = ()
    writes: tuple[tuple[slice, Turn], ...] = ()
    scale: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self.gain is not None or bool(self.reads or self.moves)

    @property
    def moves(self) -> bool:
        """Whether the output changes."""
        return self.scale is not None or bool(self.writes)

    def read(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """The input side of `x` `[..., in_features]`. The inverse raises `FormatError` where a gain is zero."""
        gain = None if self.gain is None else self.gain.to(x)
        if inverse:
            for turn in reversed(self.reads):
                x = turn(x, inverse=True)
            if gain is not None and not bool(gain.all()):
                raise FormatError("a norm has a gain of zero: what was learnt behind it cannot leave the rotation")
            return x if gain is None else x / gain
        x = x if gain is None else x * gain
        for turn in self.reads:
            x = turn(x)
        return x

    def write(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """The output side of `x` `[out_features, ...]`."""
        if not self.moves:
            return x
        x = x.clone()
        if self.scale is not None:
            scale = self.scale.to(x).view(-1, *[1] * (x.dim() - 1))
            x = x / scale if inverse else x * scale
        for rows, turn in self.writes:
            x[rows] = turn(x[rows].movedim(0, -1), inverse=inverse).movedim(-1, 0)
        return x


def changes(modelmap: ModelMap, basis: Basis) -> dict[str, Change]:
    """What `basis` changes at each port of the model, by name."""
    gains = {name: basis.gains[norm.name] for norm in modelmap.norms if norm.name in basis.gains for name in norm.feeds}
    gains |= {name: 1 / scale for name, scale in basis.scales.items()}
    ends = {value.name: last.name for block in modelmap.blocks for value, last in gates(block)}
    heads: dict[str, Turn] = {}
    values: dict[str, tuple[slice, Turn]] = {}
    for number, attention in enumerate(modelmap.attentions[: basis.attentions]):
        turn = basis.values_turn(number)
        values[attention.values.name] = attention.rows, turn
        heads[attention.output.name] = turn.repeated(modelmap.heads // modelmap.kv_heads)
    return {
        port.name: Change(
            gains.get(port.name),
            (*_input_turn(port, basis, heads), *online(basis, port)),
            (*_residual_rows(port, basis, modelmap), *([values[port.name]] if port.name in values else [])),
            basis.scales.get(ends.get(port.name, "")),
        )
        for port in modelmap.ports
    }


def online(basis: Basis, port: Port) -> tuple[Turn, ...]:
    """The transform that the input of `port` meets in the model, where there is one, over its whole width.

    That of the heads has signs: query heads that share their values are alike, and would add up in one place. So has
    that of what reads the residual stream, whose channels have a mean.
    """
    width, chosen = port.in_features, basis.rotation.online
    if not basis.rotation.folds and turns_inputs(port):
        return (basis.inputs_turn,)
    if port.reads is Space.FFN and "r4" in chosen:
        block = basis.rotation.block_size or width
        if width % block:
            raise ShapeError("block_size does not divide what r4 turns", where=port.name, got=block, wanted=width)
        return (Turn(torch.ones(width // block, block, dtype=torch.float64)),)
    if port.reads is Space.HEAD and "heads" in chosen:
        return (hadamard_turn(width, generator=torch.Generator().manual_seed(basis.rotation.seed)),)
    return ()


def turns_inputs(port: Port) -> bool:
    """Whether `online: [inputs]` is of this port: a linear of a block that reads the residual stream."""
    return port.kind == "linear" and port.block is not None and port.reads is Space.RESIDUAL


def gates(block: Block) -> tuple[tuple[Port, Port], ...]:
    """Of a gated feed-forward layer whose ports are known, the port that makes what the gate multiplies, and the last:
    what scales the one's outputs is the scale of the other's inputs."""
    if not block.gated:
        return ()
    _, value, last = (port for port in block.ports if port.name.startswith(f"{block.gated}."))
    return ((value, last),)


def _input_turn(port: Port, basis: Basis, heads: Mapping[str, Turn]) -> tuple[Turn, ...]:
    if port.reads is Space.RESIDUAL and basis.residual:
        return (basis.residual_turn,)
    return (heads[port.name],) if port.name in heads else ()


def _residual_rows(port: Port, basis: Basis, modelmap: ModelMap) -> Iterator[tuple[slice, Turn]]:
    if basis.residual:
        for space, rows in modelmap.slices(port):
            if space is Space.RESIDUAL:
                yield rows, basis.residual_turn
