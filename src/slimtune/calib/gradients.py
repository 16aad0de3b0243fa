"""The gradient of every adapted weight, sketched in the backward pass: no weight gradient is ever formed.

Of a linear `y = x Wᵀ` with output gradient `d`, the weight's gradient is `dᵀ x`, summed over tokens. Its products with
thin matrices need `x` and `d` alone: `Y += dᵀ (x P)` and `Z += (d Q)ᵀ x`. So it does not matter how the weight is
stored, no weight requires a gradient, and what is held is `O(k (in + out))` numbers a layer.

With the input or the output in the place of `d`, forward passes alone sketch the moments that other inits start from
(`slimtune.calib.sums`).
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimtune.calib.sums import Kind, LayerSums, Sums
from slimtune.errors import CalibrationError, FormatError
from slimtune.files import whole_file
from slimtune.linalg.sketch import Triples

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class LayerSketch:
    """What is known of the matrix `G` `[out, in]` of one layer: its gradient, of the mean loss of a learnt token, or
    one of its moments, summed over the tokens that were seen and divided by those learnt.

    `norm` estimates `‖G‖` (Frobenius), `energy` the fraction of `‖G‖²` in `triples`. `overlap` says how much the
    leading input directions of two halves of the batches have in common (0 to 1). `exact`: the whole of `G` was kept,
    being no larger than its sketches. `variance` is the trace of a covariance of inputs.
    """

    triples: Triples
    norm: float
    energy: float
    overlap: float | None = None
    exact: bool = False
    variance: float = 0.0


@dataclass(frozen=True)
class GradientSketch:
    """The sketched gradients of a model's layers, by their names in the model without an adapter.

    `tokens` were learnt, in `batches` batches of each process; `held_bytes` is what was held at the peak beside the
    model; `basis` is the hash of its rotation, where it has one. `stable` says whether estimation ended because more
    data changed nothing.
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
    of: Kind = "gradient"
    basis: str = ""

    @property
    def directions(self) -> int:
        """Singular triples known of each layer (narrow ones have fewer)."""
        return max(len(layer.triples.s) for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write it as one safetensors file, in which layers that share their triples (they read one input) do, too."""
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        facts: dict[str, Any] = {}
        for name, layer in self.layers.items():
            owner = owners.setdefault(id(layer.triples), name)
            facts[name] = {key: value for key, value in vars(layer).items() if key != "triples"} | {"triples": owner}
            for leaf, tensor in zip(Triples._fields, layer.triples, strict=True):
                tensors[f"{owner}.{leaf}"] = tensor.contiguous()
        rest = {key: value for key, value in asdict(replace(self, layers={})).items() if key != "layers"}
        with whole_file(path) as partial:
            save_file(tensors, partial, {"slimtune_gradients": json.dumps({**rest, "layers": facts})})

    @classmethod
    def load(cls, path: Path) -> GradientSketch:
        """Read what `save` wrote. Raises `FormatError` when it is something else."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["slimtune_gradients"])
                told: dict[str, dict[str, Any]] = facts.pop("layers")
                owners = {name: own.pop("triples", name) for name, own in told.items()}
                triples = {
                    owner: Triples(*(file.get_tensor(f"{owner}.{leaf}") for leaf in Triples._fields))
                    for owner in set(owners.values())
                }
            layers = {name: LayerSketch(triples[owners[name]], **own) for name, own in told.items()}
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
    of: Kind = "gradient",
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
        of: what `G` is: the gradient; `inputs`, their covariance, `[in, in]`; or `outputs`, the weight times the
            (damped) second moment of its inputs. The latter two look at learnt tokens, and at all that an encoder or
            an expert reads.
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
    shapes = {name: _shape(module, of) for name, module in layers.items()}
    work = Sums(shapes, of, directions, passes, seed, device)
    watched = _tapped(layers, work) if of == "gradient" else _watched(layers, work)
    with _frozen(model), watched:
        for turn in range(passes):
            work.begin(turn)
            mean = math.nan
            for number, batch in enumerate(batches[: done or None]):
                work.weight, work.odd = learnt_tokens(model, batch), number % 2 == 1
                batch = {key: value.to(device) for key, value in batch.items()}
                work.masks = {} if of == "gradient" else _masks(model, batch)
                work.add_loss(_run(model, batch, loss, number, layers, work))
                if progress is not None:
                    progress(turn * len(batches) + number + 1, passes * len(batches))
                if turn == 0 and tolerance > 0 and number + 1 >= 4 and (number + 1) & number == 0:
                    before, mean = mean, work.mean_overlap()
                    if abs(mean - before) < tolerance:
                        done = number + 1
                        break
            with torch.no_grad():
                work.end(layers)
    return _result(work, done or len(batches), stable=done > 0, seconds=time.perf_counter() - start)


def _run(model: nn.Module, batch: Batch, loss: Loss, number: int, layers: Mapping[str, nn.Module], work: Sums) -> float:
    """Forward, and where gradients are looked at backward; returns the loss."""
    with torch.set_grad_enabled(work.of == "gradient"):
        value = loss(model, batch)
        if work.of == "gradient":
            value.backward()
    found = float(value.detach())
    if not (math.isfinite(found) and work.finite()):
        name = _first_not_finite(model, layers, batch, loss) or work.not_finite()
        raise CalibrationError(
            "a gradient is not a finite number" if work.of == "gradient" else "an activation is not a finite number",
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
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, layer: LayerSums) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: LayerSums = ctx.layer
        layer.add(x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1]), layer.work.weight)
        return grads[0], None, None, None


def _result(work: Sums, batches: int, *, stable: bool, seconds: float) -> GradientSketch:
    """The sketch, without the sums it was made of."""
    layers: dict[str, LayerSketch] = {}
    for name, layer in work.layers.items():
        assert layer.triples is not None, "a last pass has made them"
        captured = float(layer.triples.s.double().square().sum())
        total = max(layer.norm_square, captured)  # the former is an estimate
        energy = captured / total if total else 0.0
        layers[name] = LayerSketch(layer.triples, math.sqrt(total), energy, layer.overlap, layer.whole, layer.variance)
    return GradientSketch(
        layers,
        int(work.tokens),
        batches,
        work.passes,
        work.seed,
        work.loss,
        work.held_bytes,
        seconds,
        stable,
        unreached=tuple(name for name, layer in layers.items() if not layer.norm),
        of=work.of,
    )


def _shape(module: nn.Module, of: Kind) -> tuple[int, int]:
    linear = cast(nn.Linear, module)
    return linear.in_features if of == "inputs" else linear.out_features, linear.in_features


def _masks(model: nn.Module, batch: Batch) -> dict[int, Tensor]:
    """Which tokens are looked at, by how many there are: of a decoder those learnt, of an encoder all."""
    masks = [batch["labels"] >= 0]
    if cast(Any, model).config.is_encoder_decoder:
        masks.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0)
    if len({mask.shape for mask in masks}) == 1:  # nothing tells the two sides apart
        masks = [torch.stack(masks).any(0)]
    return {mask.numel(): mask.flatten() for mask in masks}


@contextmanager
def _watched(layers: Mapping[str, nn.Module], work: Sums) -> Iterator[None]:
    """Every layer's sums see its inputs and outputs in the block."""

    def look(layer: LayerSums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
            mask = work.masks.get(len(x))
            layer.see(*((x, y) if mask is None else (x[mask], y[mask])), cast(Any, module).bias)

        return see

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(look(work.layers[name])).remove)
        yield


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], work: Sums) -> Iterator[None]:
    """Every layer's output passes a `_Tap` on its way, in the block."""
    anchor = torch.zeros((), device=work.device, requires_grad=True)

    def tap(layer: LayerSums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
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
