"""Sketching a matrix of each layer of a model, `G = Σ dᵀ x` over tokens, from thin products alone.

Of a linear `y = x Wᵀ`, `G` is the gradient of the weight where `d` is that of `y`, the second moment of the inputs
where `d = x`, and `W` times that where `d = y`. Sums of sketches are sketches of sums: batches and processes add up
exactly. Every sum lies in one float32 allocation, which one all-reduce adds over the processes of a
`torch.distributed` group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtune.errors import CalibrationError
from slimtune.linalg.sketch import Triples, from_left, from_right, gaussian, one_pass, orthonormal, row_overlap

Kind = Literal["gradient", "inputs", "outputs"]
"""What `d` is: the gradient of the output, the input (from its mean), or the output (without its bias)."""

OVERSAMPLE = 8
"""Columns of a sketch beyond the directions that are asked for."""

DAMPING = 0.01
"""Of `outputs`: the share of the inputs' mean square that is added to every feature, as in CorDA's code."""

CHUNK = 1024
"""Features that are damped at once."""


class LayerSums:
    """The sums of one weight: `y = G P` if there is a `right` basis, `z = Q G` if there is a `left` one, else all of
    `G`. `half` is `z` of every other batch, its first rows."""

    def __init__(self, work: Sums, out: int, width: int) -> None:
        self.work, self.out, self.width = work, out, width
        k = min(work.directions + OVERSAMPLE, out, width)
        wide = min(3 * k // 2, out)  # of the sketch that is solved for; 2k captures hardly more (docs/LOG.md)
        self.k, self.l = k, (wide if work.passes == 1 else k)
        self.whole = out * width <= (out * k if work.passes == 1 else 0) + width * self.l
        self.first: Tensor | None = None  # of `inputs`, their sum
        self.mass: Tensor | None = (
            None  # of `inputs` how many and their squares' sum, of `outputs` that of their inputs'
        )
        self.variance = 0.0
        self.dtype = torch.float32
        self.right: Tensor | None = None
        self.left: Tensor | None = None
        self.y: Tensor | None = None
        self.z: Tensor | None = None
        self.half: Tensor | None = None
        self.mix: Tensor | None = None  # of a whole `G`, the rows that `half` has
        self.triples: Triples | None = None
        self.norm_square = 0.0
        self.overlap: float | None = None

    def prepare(self, turn: int) -> None:
        """Choose what to multiply with in this pass."""
        work = self.work
        if self.whole:
            self.mix = work.random(self.out, min(self.out, work.directions // 2 + OVERSAMPLE), 1)
        elif work.passes == 1:
            self.right, self.left = work.random(self.width, self.k, 0), work.random(self.out, self.l, 1)
        elif turn == 0:
            self.right = work.random(self.width, self.k, 0)
        elif turn % 2:
            assert self.y is not None
            self.left, self.right = orthonormal(self.y), None
        else:
            assert self.z is not None
            self.left, self.right = None, orthonormal(self.z.T)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of `y` (turned over), `z`, `half`, `first` and `mass` in this pass."""
        of = self.work.of
        extra = [
            (1, self.width) if of == "inputs" else (0, 0),
            (0, 0) if of == "gradient" else (1, 1 + (of == "inputs")),
        ]
        if self.mix is not None:
            return [(0, 0), (self.out, self.width), (self.mix.shape[1], self.width), *extra]
        y = (self.k, self.out) if self.right is not None else (0, 0)
        rows = 0 if self.left is None else self.left.shape[1]
        half = min(rows, self.work.directions // 2 + OVERSAMPLE)
        return [y, (rows, self.width) if rows else (0, 0), (half, self.width) if rows else (0, 0), *extra]

    def take(self, sums: Iterator[Tensor]) -> None:
        """Where this pass adds up: tensors of these shapes."""
        y, self.z, self.half, self.first, self.mass = (next(sums) for _ in range(5))
        self.y = y.T

    def see(self, x: Tensor, output: Tensor, bias: Tensor | None) -> None:
        """Add tokens of a forward pass: `x` `[tokens, in]`, `output` `[tokens, out]`."""
        assert self.first is not None and self.mass is not None
        self.dtype = x.dtype
        x = x.to(torch.float32)
        if self.work.of == "inputs":
            self.first += x.sum(0)
            self.mass += torch.stack([x.new_tensor(len(x)), x.square().sum()])
            self.add(x, x, 1)
        else:
            self.mass += x.square().sum()
            self.add(x, output if bias is None else output - bias, 1)

    def settle(self, module: nn.Module) -> None:
        """What the sums of a whole pass still lack, as further tokens: one for the mean of the inputs, to be taken
        away, or one along each feature for the damping of the inputs' second moment."""
        assert self.first is not None and self.mass is not None
        self.work.odd = False
        if self.work.of == "inputs" and (count := float(self.mass[0, 0])):
            self.variance = float(self.mass[0, 1] - self.first.square().sum() / count)
            self.add(self.first, self.first, -1 / count)
        elif self.work.of == "outputs":
            share = DAMPING * float(self.mass) / self.width
            bias = getattr(module, "bias", None)
            for rows in torch.eye(self.width, dtype=self.dtype, device=self.work.device).split(CHUNK):
                output = module.forward(rows)  # past the hooks that add up
                self.add(rows, output if bias is None else output - bias, share)

    def add(self, x: Tensor, d: Tensor, weight: float) -> None:
        """Add what these tokens contribute: `x` `[tokens, in]`, `d` `[tokens, out]`."""
        x, d = x.to(torch.float32), d.to(torch.float32)
        if self.right is not None and self.y is not None:
            self.y.T.addmm_(self.work.thin(x, self.right).T, d, alpha=weight)  # faster than the other way round
        if self.whole or self.left is not None:
            assert self.z is not None and self.half is not None
            part = (d if self.left is None else d @ self.left).T @ x
            self.z.add_(part, alpha=weight)
            if self.work.odd:
                self.half.add_(part[: len(self.half)] if self.mix is None else self.mix.T @ part, alpha=weight)

    def halves(self) -> float | None:
        """The overlap of the leading input directions of even and odd batches, half of those asked for."""
        if self.z is None or self.half is None or not bool(self.half.any()):
            return None
        rest = (self.z[: len(self.half)] if self.mix is None else self.mix.T @ self.z) - self.half
        if not bool(rest.any()):
            return None
        return row_overlap(self.half, rest, max(1, min(self.work.directions // 2, len(self.half))))

    def factorise(self, turn: int) -> None:
        """After the sums of pass `turn` are complete: the triples after the last one."""
        last, count = turn == self.work.passes - 1, self.work.directions
        if self.whole:
            if last:
                assert self.z is not None
                self.norm_square = float(self.z.square().sum())
                self.triples = _of_whole(self.z, count)
            return
        if turn == 0:
            products = [t for t in (self.y, self.z) if t is not None and t.numel()]
            rows = (self.k if self.y is not None else 0) + (self.l if self.z is not None and self.z.numel() else 0)
            self.norm_square = sum(float(t.square().sum()) for t in products) / rows
        if last:
            if self.left is not None and self.right is not None:
                assert self.y is not None and self.z is not None
                self.triples = one_pass(self.y, self.z, self.left.T, count)
            elif self.left is not None:
                assert self.z is not None
                self.triples = from_left(self.left, self.z, count)
            else:
                assert self.y is not None and self.right is not None
                self.triples = from_right(self.y, self.right, count)


def _of_whole(g: Tensor, count: int) -> Triples:
    if g.shape[0] <= g.shape[1]:
        return from_left(torch.eye(g.shape[0], device=g.device), g, count)
    return from_right(g, torch.eye(g.shape[1], device=g.device), count)


class Sums:
    """All sums of a pass in one allocation, and the random matrices, which layers of one width share."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        of: Kind,
        directions: int,
        passes: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.of, self.directions, self.passes, self.seed, self.device = of, directions, passes, seed, device
        self.layers = {name: LayerSums(self, *shape) for name, shape in shapes.items()}
        self.masks: dict[int, Tensor] = {}  # which tokens are looked at, by how many there are
        self.weight, self.odd = 0, False  # learnt tokens of the batch, and whether it is every other one
        self.flat = torch.empty(0)
        self.held_bytes = 0
        self._random: dict[tuple[int, int, int], Tensor] = {}
        self._thin: tuple[Tensor, Tensor, Tensor] | None = None

    def thin(self, x: Tensor, right: Tensor) -> Tensor:
        """`x @ right`, once for the layers that read the same `x` one after the other."""
        known = self._thin
        if known is None or known[1] is not right or known[0].data_ptr() != x.data_ptr() or known[0].shape != x.shape:
            self._thin = known = (x, right, x @ right)  # while `x` is held, nothing else can be where it is
        return known[2]

    def random(self, rows: int, columns: int, side: int) -> Tensor:
        """Gaussian `[rows, columns]`; equal for equal arguments, so that layers and processes agree."""
        key = rows, columns, side
        if key not in self._random:
            self._random[key] = gaussian(rows, columns, 2 * self.seed + side, self.device)
        return self._random[key]

    def begin(self, turn: int) -> None:
        """Allocate the sums of pass `turn`."""
        for layer in self.layers.values():
            layer.prepare(turn)
        shapes = [shape for layer in self.layers.values() for shape in layer.shapes]
        sizes = [rows * columns for rows, columns in shapes]
        self.turn = turn
        self.flat = torch.zeros(sum(sizes) + 2, device=self.device)  # at its end: learnt tokens, and their losses
        views = iter([part.view(shape) for part, shape in zip(self.flat[:-2].split(sizes), shapes, strict=True)])
        for layer in self.layers.values():
            layer.take(views)
        bases = {id(b): b.numel() for layer in self.layers.values() for b in (layer.left, layer.right) if b is not None}
        self.held_bytes = max(self.held_bytes, 4 * (len(self.flat) + sum(bases.values())))

    def add_loss(self, value: float) -> None:
        """Count a batch."""
        self.flat[-2:] += torch.tensor([self.weight, self.weight * value], device=self.device)

    def finite(self) -> bool:
        """Whether every sum is finite, found without an allocation."""
        return math.isfinite(float(self.flat.sum()))

    def not_finite(self) -> str:
        """The layer nearest the loss whose sums are not finite."""
        sums = {name: (layer.y, layer.z) for name, layer in self.layers.items()}
        bad = [n for n, ts in sums.items() if not all(bool(t.isfinite().all()) for t in ts if t is not None)]
        return bad[-1] if bad else "none of the adapted ones"

    def mean_overlap(self) -> float:
        """Of the layers where it is known."""
        known = [value for layer in self.layers.values() if (value := layer.halves()) is not None]
        return sum(known) / len(known) if known else math.nan

    def end(self, modules: Mapping[str, nn.Module]) -> None:
        """Add up the processes, divide by the tokens, and factorise."""
        self._thin = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.flat)
        self.tokens, total = (float(value) for value in self.flat[-2:])
        if not self.tokens:
            raise CalibrationError("no token of the batches is learnt", remedy="give rows with an assistant's reply")
        self.loss = total / self.tokens
        self.flat[:-2] /= self.tokens
        for name, layer in self.layers.items():
            if layer.half is not None and layer.half.numel():
                layer.overlap = layer.halves()
            if self.of != "gradient":
                layer.settle(modules[name])
            layer.factorise(self.turn)
        self._thin = None
