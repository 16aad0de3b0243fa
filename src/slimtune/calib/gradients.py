"""The gradient of every adapted weight, sketched in the backward pass: no weight gradient is ever formed.

Of a linear `y = x Wᵀ` with output gradient `d`, the weight's gradient is `dᵀ x`, summed over tokens. Its products with
thin matrices need `x` and `d` alone: `Y += dᵀ (x P)` and `Z += (d Q)ᵀ x`. So it does not matter how the weight is
stored, no weight requires a gradient, and what is held is `O(k (in + out))` numbers a layer. Sums of sketches are
sketches of sums: batches and processes add up exactly.

Every sum lies in one float32 allocation, which one all-reduce adds over the processes of a `torch.distributed` group.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimtune.errors import CalibrationError, FormatError
from slimtune.files import whole_file
from slimtune.linalg.sketch import Triples, from_left, from_right, gaussian, one_pass, orthonormal, overlap

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

OVERSAMPLE = 8
"""Columns of a sketch beyond the directions that are asked for."""


@dataclass(frozen=True)
class LayerSketch:
    """What is known of the gradient `G` `[out, in]` of one weight (of the mean loss of a learnt token).

    `norm` estimates `‖G‖` (Frobenius), `energy` the fraction of `‖G‖²` in `triples`. `overlap` says how much the
    leading input directions of two halves of the batches have in common (0 to 1). `exact`: the whole of `G` was kept,
    being no larger than its sketches.
    """

    triples: Triples
    norm: float
    energy: float
    overlap: float | None = None
    exact: bool = False


@dataclass(frozen=True)
class GradientSketch:
    """The sketched gradients of a model's layers, by their names in the model without an adapter.

    `tokens` were learnt, in `batches` batches of each process; `held_bytes` is what was held at the peak beside the
    model. `stable` says whether estimation ended because more data changed nothing.
    """

    layers: dict[str, LayerSketch]
    tokens: int
    batches: int
    passes: int
    seed: int
    loss: float
    held_bytes: int = 0
    seconds: float = 0.0
    stable: bool = False
    unreached: tuple[str, ...] = field(default=())

    @property
    def directions(self) -> int:
        """Singular triples known of each layer (narrow ones have fewer)."""
        return max(len(layer.triples.s) for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for name, layer in self.layers.items():
            facts[name] = {"norm": layer.norm, "energy": layer.energy, "overlap": layer.overlap, "exact": layer.exact}
            for leaf, tensor in zip(Triples._fields, layer.triples, strict=True):
                tensors[f"{name}.{leaf}"] = tensor.contiguous()
        rest = {key: value for key, value in asdict(replace(self, layers={})).items() if key != "layers"}
        with whole_file(path) as partial:
            save_file(tensors, partial, {"slimtune_gradients": json.dumps({**rest, "layers": facts})})

    @classmethod
    def load(cls, path: Path) -> GradientSketch:
        """Read what `save` wrote. Raises `FormatError` when it is something else."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["slimtune_gradients"])
                layers = {
                    name: LayerSketch(Triples(*(file.get_tensor(f"{name}.{leaf}") for leaf in Triples._fields)), **own)
                    for name, own in facts.pop("layers").items()
                }
            return cls(layers=layers, **{**facts, "unreached": tuple(facts["unreached"])})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError("not a sketch of gradients", where=str(path), got=str(error)[:200]) from error


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch's learnt tokens, as the model itself computes it."""
    return cast(Tensor, model(**batch, use_cache=False).loss)


def learnt_tokens(model: nn.Module, batch: Batch) -> int:
    """The tokens that `model_loss` is the mean of: a decoder predicts nothing at the first position."""
    labels = batch["labels"] if cast(Any, model).config.is_encoder_decoder else batch["labels"][:, 1:]
    return int((labels >= 0).sum())


def sketch_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    directions: int,
    passes: int = 1,
    seed: int = 0,
    tolerance: float = 0.0,
    loss: Loss = model_loss,
    progress: Callable[[int, int], None] | None = None,
) -> GradientSketch:
    """Sketch the gradient of the mean loss over all learnt tokens of `batches` with respect to each layer's weight.

    Args:
        model: a Hugging Face model, with or without an adapter, dense or quantized; it is left as it was.
        layers: the linears inside it, by the names they are to have in the result. Of an adapted linear, its base.
        batches: keyword arguments of `model`, `labels` among them. Each process of a distributed group gives its own.
        directions: singular triples wanted; LoRA-GA wants twice the rank.
        passes: 1 takes both sketches at once (`linalg.sketch.one_pass`); 2 project the gradient onto the range that the
            first pass found; each further one is half a power iteration on the same data.
        seed: of the random directions.
        tolerance: stop when the layers' mean overlap of two halves changes by less than this as the data doubles; 0:
            use all batches. Overlaps are of input directions, which the first of several passes does not see.
        loss: the mean loss of a batch's learnt tokens.
        progress: called with batches done and batches in all.

    Dropout is off, and no parameter requires a gradient. Raises `CalibrationError` where there is nothing to sketch,
    or a loss or a gradient is not a finite number, naming layer and batch.
    """
    if not layers:
        raise CalibrationError("there is no layer whose gradient could be sketched")
    if not batches:
        raise CalibrationError("there is no batch to take gradients of")
    start, done = time.perf_counter(), 0
    device = next(p.device for p in model.parameters())
    work = _Work({name: _shape(module) for name, module in layers.items()}, directions, passes, seed, device)
    with _frozen(model), _tapped(layers, work):
        for turn in range(passes):
            work.begin(turn)
            mean = math.nan
            for number, batch in enumerate(batches[: done or None]):
                work.weight, work.odd = learnt_tokens(model, batch), number % 2 == 1
                batch = {key: value.to(device) for key, value in batch.items()}
                work.add_loss(_backward(model, batch, loss, number, layers, work))
                if progress is not None:
                    progress(turn * len(batches) + number + 1, passes * len(batches))
                if turn == 0 and tolerance > 0 and number + 1 >= 4 and (number + 1) & number == 0:
                    before, mean = mean, work.mean_overlap()
                    if abs(mean - before) < tolerance:
                        done = number + 1
                        break
            work.end()
    return work.result(done or len(batches), stable=done > 0, seconds=time.perf_counter() - start)


def _backward(
    model: nn.Module, batch: Batch, loss: Loss, number: int, layers: Mapping[str, nn.Module], work: _Work
) -> float:
    with torch.enable_grad():
        value = loss(model, batch)
        value.backward()
    found = float(value.detach())
    if not (math.isfinite(found) and work.finite()):
        name = _first_not_finite(model, layers, batch, loss) or work.not_finite()
        raise CalibrationError(
            "a gradient is not a finite number",
            where=f"batch {number + 1}, layer {name}",
            got=f"loss {found}",
            remedy="look at this layer's weights and this batch's rows, or use dtype: float32",
        )
    return found


def _first_not_finite(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, loss: Loss) -> str:
    """The first layer whose output is not finite, in the order in which they run; empty if all are."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: found.append(name) if not bool(output.isfinite().all()) else None

    with ExitStack() as stack, torch.no_grad():
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(look(name)).remove)
        loss(model, batch)
    return found[0] if found else ""


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, whose backward pass shows the layer's input and output gradient to `layer`.

    `anchor` requires a gradient, so that the output does, whatever the layer's input.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.layer.add(x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1]))
        return grads[0], None, None, None


class _Layer:
    """The sums of one weight: `y = G P` if there is a `right` basis, `z = Q G` if there is a `left` one, else all of
    `G`. `half` is `z` of every other batch, its first rows."""

    def __init__(self, work: _Work, out: int, width: int) -> None:
        self.work, self.out, self.width = work, out, width
        k = min(work.directions + OVERSAMPLE, out, width)
        wide = min(3 * k // 2, out)  # of the sketch that is solved for; 2k captures hardly more (docs/LOG.md)
        self.k, self.l = k, (wide if work.passes == 1 else k)
        self.whole = out * width <= (out * k if work.passes == 1 else 0) + width * self.l
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
        """Of `y`, `z` and `half` in this pass."""
        if self.mix is not None:
            return [(0, 0), (self.out, self.width), (self.mix.shape[1], self.width)]
        y = (self.out, self.k) if self.right is not None else (0, 0)
        rows = 0 if self.left is None else self.left.shape[1]
        half = min(rows, self.work.directions // 2 + OVERSAMPLE)
        return [y, (rows, self.width) if rows else (0, 0), (half, self.width) if rows else (0, 0)]

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add what these tokens contribute: `x` `[tokens, in]`, `d` `[tokens, out]`."""
        x, d, weight = x.to(torch.float32), d.to(torch.float32), self.work.weight
        if self.right is not None and self.y is not None:
            self.y.addmm_(d.T, x @ self.right, alpha=weight)
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
        count = max(1, min(self.work.directions // 2, len(self.half)))
        eye = torch.eye(len(rest), device=rest.device)
        return overlap(from_left(eye, self.half, count).v, from_left(eye, rest, count).v)

    def factorise(self, turn: int) -> None:
        """After the sums of pass `turn` are complete: the triples after the last one, and the overlap."""
        if self.half is not None and self.half.numel():
            self.overlap = self.halves()
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


class _Work:
    """All sums of a pass in one allocation, and the random matrices, which layers of one width share."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], directions: int, passes: int, seed: int, device: torch.device
    ) -> None:
        self.directions, self.passes, self.seed, self.device = directions, passes, seed, device
        self.layers = {name: _Layer(self, *shape) for name, shape in shapes.items()}
        self.weight, self.odd = 0, False
        self.flat = torch.empty(0)
        self.held_bytes = 0
        self._random: dict[tuple[int, int, int], Tensor] = {}

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
            layer.y, layer.z, layer.half = next(views), next(views), next(views)
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

    def end(self) -> None:
        """Add up the processes, divide by the tokens, and factorise."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.flat)
        self.tokens, total = (float(value) for value in self.flat[-2:])
        if not self.tokens:
            raise CalibrationError("no token of the batches is learnt", remedy="give rows with an assistant's reply")
        self.loss = total / self.tokens
        self.flat[:-2] /= self.tokens
        for layer in self.layers.values():
            layer.factorise(self.turn)

    def result(self, batches: int, *, stable: bool, seconds: float) -> GradientSketch:
        """The sketch, without the sums it was made of."""
        layers: dict[str, LayerSketch] = {}
        for name, layer in self.layers.items():
            assert layer.triples is not None, "a last pass has made them"
            captured = float(layer.triples.s.double().square().sum())
            total = max(layer.norm_square, captured)  # the former is an estimate
            energy = captured / total if total else 0.0
            layers[name] = LayerSketch(layer.triples, math.sqrt(total), energy, layer.overlap, layer.whole)
        unreached = tuple(name for name, layer in layers.items() if not layer.norm)
        return GradientSketch(
            layers, int(self.tokens), batches, self.passes, self.seed, self.loss, self.held_bytes, seconds, stable,
            unreached,
        )  # fmt: skip


def _shape(module: nn.Module) -> tuple[int, int]:
    linear = cast(nn.Linear, module)
    return linear.out_features, linear.in_features


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], work: _Work) -> Iterator[None]:
    """Every layer's output passes a `_Tap` on its way, in the block."""
    anchor = torch.zeros((), device=work.device, requires_grad=True)

    def tap(layer: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, args, output: cast(Tensor, _Tap.apply(output, args[0].detach(), anchor, layer))

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(tap(work.layers[name])).remove)
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, and dropout is off; blocks that recompute their activations go on doing so.

    The embedding's outputs require gradients: reentrant checkpointing looks at a block's inputs. Everything is as it
    was at the end, whatever happens.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    embedding: nn.Module = cast(Any, model).get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, y: y if y.requires_grad else y.requires_grad_())
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        for module, _ in modes:
            if getattr(module, "gradient_checkpointing", False):  # transformers recomputes in training mode alone
                module.training = True
                rates += [(module, k, v) for k, v in vars(module).items() if "dropout" in k and isinstance(v, float)]
        for module, key, _ in rates:
            setattr(module, key, 0.0)
        yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for module, key, rate in rates:
            setattr(module, key, rate)
