"""Quantizing the linears of a model in place, block by block.

The only mutation in `quant`: a chosen linear becomes a `QuantLinear`. Which ones, and with what, is one predicate;
every linear and embedding that is left alone is reported with the reason.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from slimtune.arch import Block, ModelMap, Port
from slimtune.arch.weights import require_finite
from slimtune.calib.capture import CalibrationStream, calibration_stream
from slimtune.calib.ondemand import empty_, empty_slots
from slimtune.calib.stats import DRIFT
from slimtune.errors import CalibrationError, RecipeError, ShapeError
from slimtune.kernels.memory import release
from slimtune.linalg.lowrank import Factors
from slimtune.quant.activation import Activations, Search
from slimtune.quant.base import QTensor, Quantizer, Stats, relative_error
from slimtune.quant.blackbox import FROZEN
from slimtune.quant.linear import QuantLinear

Start = Callable[[Tensor, Tensor, Stats], Factors]
"""What an adapter on a layer will start from, given its weight, the weight as quantized, and the statistics."""

Choose = Callable[[Port], "Quantizer | str"]
"""Which method a port gets, or the reason why it gets none."""

Rounds = Callable[[Port], "Activations | None"]
"""How the input of a port that gets a method is rounded."""


@dataclass(frozen=True)
class LayerFact:
    """What quantizing one layer did. `error` is the squared error of its outputs relative to their square (of its
    weights, where the method used no calibration), on rounded inputs where it rounds them to `activations` bits."""

    name: str
    shape: tuple[int, int]
    bits: float
    error: float
    activations: int = 16
    clip_ratio: float = 1.0


@dataclass(frozen=True)
class Skipped:
    """A linear or embedding that was left as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class QuantizeFacts:
    """What `quantize_` did to a model."""

    layers: tuple[LayerFact, ...]
    skipped: tuple[Skipped, ...]
    bits_per_weight: float
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for `report.json`."""
        return asdict(self)


@dataclass(frozen=True)
class QuantizedLayer:
    """A finished layer: its port's name, its weight in few bits, the error that was measured, where an adapter starts,
    if that was asked for, and how the input is rounded."""

    name: str
    weight: QTensor
    error: float
    start: Factors | None = None
    activations: Activations | None = None


class BlockStore(Protocol):
    """Where finished blocks are kept, so that interrupted work resumes."""

    def load(self, block: Block) -> list[QuantizedLayer] | None:
        """The quantized layers of `block`, if it was finished before."""

    def save(self, block: Block, layers: list[QuantizedLayer]) -> None:
        """Keep the quantized layers of `block`."""


def all_linear(quantizer: Quantizer, ignore: Sequence[str] = ()) -> Choose:
    """Every linear inside a decoder or encoder block, except names that match a pattern of `ignore` (`*` wildcards)."""

    def choose(port: Port) -> Quantizer | str:
        if port.tied_to is not None:
            return f"tied to {port.tied_to}"
        if port.kind == "embedding":
            return "an embedding, not a linear"
        if port.block is None:
            return "outside the decoder and encoder blocks"
        for pattern in ignore:
            if matches(port.name, pattern):
                return f"ignored by '{pattern}'"
        return quantizer

    return choose


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` (`*` wildcards) fits the name of a layer, or the last component of it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rsplit(".", 1)[-1], pattern)


def quantize_(
    model: nn.Module,
    modelmap: ModelMap,
    choose: Choose,
    *,
    activations: Rounds = lambda _: None,
    tokens: Tensor | None = None,
    batch_size: int = 4,
    materialise: Callable[[nn.Module, str], None] | None = None,
    store: BlockStore | None = None,
    start: Start | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeFacts:
    """Quantize the chosen linears of `model` in place.

    Args:
        model: a Hugging Face model; blocks may still be on `meta` when `materialise` is given.
        modelmap: its map, from `bind`.
        choose: which method a port gets.
        activations: how its input is rounded. Methods see rounded inputs, made by layers that round theirs.
        tokens: calibration windows `[samples, length]`; needed when a chosen method needs statistics. Where an adapter
            starts from what is lost, they weigh it, whatever the method needs.
        batch_size: windows that run through a block together.
        materialise: loads the weights of the block called by the second argument.
        store: where finished blocks are kept and looked for.
        start: finds what an adapter will start from; it is kept as `QuantLinear.start`.
        progress: called with (finished blocks, all blocks).

    Raises `CalibrationError` when a method needs statistics and there are no tokens or they are not finite,
    `RecipeError` when nothing is chosen, `ShapeError` when a chosen layer is not a plain linear (any more) and
    `FormatError` when a weight is not finite.
    """
    began = time.perf_counter()
    chosen = {port.name: choose(port) for port in modelmap.ports}
    methods = {name: method for name, method in chosen.items() if not isinstance(method, str)}
    rounds = {port.name: activations(port) for port in modelmap.ports if port.name in methods}
    if not methods:
        raise RecipeError("there is nothing to quantize", got=", ".join(sorted({str(v) for v in chosen.values()})))
    needs = _needs(model, methods, rounds, tokens) | _weighing(start, tokens)
    context = (
        calibration_stream(model, modelmap, tokens, batch_size=batch_size)
        if needs and tokens is not None
        else nullcontext(None)
    )
    _require_finite(model, modelmap, materialise)
    finished: list[QuantizedLayer] = []
    with torch.no_grad(), context as stream, ExitStack() as rounding:
        for number, block in enumerate(modelmap.blocks, start=1):
            module = model.get_submodule(block.name)
            if materialise is not None:
                materialise(module, block.name)
            weights = {name: parameter.data for name, parameter in module.named_parameters()}
            if stream is not None:
                stream.enter(block, follow=DRIFT in needs)  # may compute in fewer bits than the weights have
            layers = store.load(block) if store is not None else None
            if layers is None:
                layers = []
                for index in range(len(block.stages)):
                    done = _quantize_stage(module, block, index, methods, rounds, weights, stream, start)
                    _round_inputs(module, block, done, rounding)
                    layers += done
                    if stream is not None:
                        stream.settle(block, index)
                if store is not None:
                    store.save(block, layers)
            elif stream is not None:
                _recall_(module, block, layers, rounding)
            if stream is not None:
                stream.advance(block, last=number == len(modelmap.blocks))
            rounding.close()
            for layer in layers:
                _replace_(module, _within(block, layer.name), layer)
            finished.extend(layers)
            release()
            if progress is not None:
                progress(number, len(modelmap.blocks))
    skipped = tuple(Skipped(name, method) for name, method in chosen.items() if isinstance(method, str))
    return _facts(finished, skipped, time.perf_counter() - began)


def _require_finite(model: nn.Module, modelmap: ModelMap, materialise: Callable[[nn.Module, str], None] | None) -> None:
    """Raise `FormatError` where a weight is not finite, also one that keeps its bits: before hours of work. A block
    that is on `meta` is read for it, and given back."""
    require_finite(model)
    for block in modelmap.blocks:
        module = model.get_submodule(block.name)
        if materialise is not None and (slots := empty_slots(module)):
            materialise(module, block.name)
            require_finite(module, block.name)
            empty_(slots)


def _needs(
    model: nn.Module, methods: dict[str, Quantizer], rounds: dict[str, Activations | None], tokens: Tensor | None
) -> frozenset[str]:
    """What calibration has to find. Raises `ShapeError` for a layer that is no plain linear (any more), and
    `CalibrationError` where something is to be found and there are no `tokens`."""
    for name in methods:
        if not isinstance(linear := model.get_submodule(name), nn.Linear):
            raise ShapeError("only a plain linear can be quantized", where=name, got=type(linear).__name__)
    needs = frozenset[str]().union(*(method.needs for method in methods.values()))
    if any(rounding is not None and rounding.calibrated for rounding in rounds.values()):
        needs |= {"the range of the activations"}
    if needs and tokens is None:
        raise CalibrationError("the quantizer needs calibration data", wanted=", ".join(sorted(needs)))
    return needs


def _weighing(start: Start | None, seen: Tensor | CalibrationStream | None) -> frozenset[str]:
    """What `start` weighs a loss by, where there is calibration to find it from."""
    return frozenset({"hessian"} if start is not None and seen is not None else ())


def _quantize_stage(
    module: nn.Module,
    block: Block,
    stage: int,
    methods: dict[str, Quantizer],
    rounds: dict[str, Activations | None],
    weights: dict[str, Tensor],
    stream: CalibrationStream | None,
    start: Start | None,
) -> list[QuantizedLayer]:
    """Quantize the layers of a block that share one input, and let the block compute with the result from here on."""
    ports = [port for port in block.stages[stage] if port.name in methods]
    layers = []
    seen = _Inputs(stream, block, stage)
    for port in ports:
        rounding = seen.found(rounds[port.name])
        needs = methods[port.name].needs
        known = seen.stats(needs | _weighing(start, stream), rounding)
        stats = {key: known[key] for key in known if key in needs}
        name = _within(block, port.name) + ".weight"
        weight = weights[name]
        quantized = methods[port.name](weight, stats)
        dense = quantized.dequantize()
        exact = weight.to(torch.float32)
        error = relative_error(exact, dense, stats.get("hessian"))
        factors = start(exact, dense, known) if start is not None else None
        if stream is not None:
            _compute_with_(module.get_parameter(name), dense)
        layers.append(QuantizedLayer(port.name, quantized, error, factors, rounding))
    return layers


class _Inputs:
    """What calibration finds out about the input that the layers of a stage share, rounded or not; each thing once."""

    def __init__(self, stream: CalibrationStream | None, block: Block, stage: int) -> None:
        self._stream, self._block, self._stage = stream, block, stage
        self._found: dict[Activations, Activations] = {}
        self._stats: dict[tuple[frozenset[str], Activations | None], dict[str, Tensor]] = {}

    def found(self, rounding: Activations | None) -> Activations | None:
        """The rounding with everything in it that calibration finds."""
        if rounding is None or not rounding.calibrated:
            return rounding
        if rounding not in self._found:
            search = Search(rounding)
            assert self._stream is not None, "there are tokens where there is something to find"
            self._stream.watch(self._block, self._stage, search.update)
            self._found[rounding] = search.result()
        return self._found[rounding]

    def stats(self, needs: frozenset[str], rounding: Activations | None) -> dict[str, Tensor]:
        """The statistics that a method needs, of the input as it is rounded."""
        if not needs or self._stream is None:
            return {}
        key = needs, rounding
        if key not in self._stats:
            self._stats[key] = self._stream.collect(self._block, self._stage, needs, rounding)
            for name, statistic in self._stats[key].items():
                if not bool(torch.isfinite(statistic).all()):
                    raise CalibrationError(
                        "the calibration statistics of a layer are not finite",
                        where=self._block.stages[self._stage][0].name,
                        got=name,
                        remedy="use dtype: float32, or check the calibration data and the model for NaN",
                    )
        return self._stats[key]


def _recall_(module: nn.Module, block: Block, layers: list[QuantizedLayer], until: ExitStack) -> None:
    """Let a block compute with what was kept of it."""
    for layer in layers:
        _compute_with_(module.get_parameter(_within(block, layer.name) + ".weight"), layer.weight.dequantize())
    _round_inputs(module, block, layers, until)


def _compute_with_(parameter: nn.Parameter, weight: Tensor) -> None:
    """Put `weight` in the place of a parameter's own, which may be pages of a file: writing there would copy them, and
    the copies would stay for as long as any other tensor of that file does."""
    parameter.data = weight.to(parameter)


def _round_inputs(module: nn.Module, block: Block, layers: list[QuantizedLayer], until: ExitStack) -> None:
    """Let linears whose weights are final round their inputs, so that what comes after them is calibrated on it."""
    for layer in layers:
        if layer.activations is not None:
            linear = module.get_submodule(_within(block, layer.name))
            until.enter_context(linear.register_forward_pre_hook(partial(_rounded, layer.activations)))


def _rounded(activations: Activations, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (activations(args[0]), *args[1:])


def _replace_(block: nn.Module, path: str, layer: QuantizedLayer) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = block.get_submodule(parent)
    linear = owner.get_submodule(leaf)
    assert isinstance(linear, nn.Linear)  # as quantize_ found
    quantized = QuantLinear.from_linear(linear, layer.weight, layer.activations)
    quantized.start = layer.start
    setattr(owner, leaf, quantized)


def _within(block: Block, name: str) -> str:
    return name.removeprefix(block.name + ".")


def _facts(layers: list[QuantizedLayer], skipped: tuple[Skipped, ...], seconds: float) -> QuantizeFacts:
    size = sum(layer.weight.bytes for layer in layers)
    shapes = [(layer.weight.layout.out_features, layer.weight.layout.in_features) for layer in layers]
    facts = tuple(
        LayerFact(
            layer.name,
            shape,
            layer.weight.bits_per_weight,
            layer.error,
            *((rounding.bits, rounding.clip_ratio) if (rounding := layer.activations) is not None else ()),
        )
        for layer, shape in zip(layers, shapes, strict=True)
    )
    return QuantizeFacts(facts, skipped, 8 * size / sum(o * i for o, i in shapes), size, seconds)


def dequantize_(model: nn.Module, dtype: torch.dtype) -> int:
    """Turn every quantized linear of `model`, `QuantLinear` or `BlackBox`, into a dense, frozen one of `dtype`, in
    place; returns how many there were."""
    quantized = [name for name, module in model.named_modules() if isinstance(module, FROZEN)]
    for name in quantized:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = owner.get_submodule(leaf)
        assert isinstance(layer, FROZEN)
        setattr(owner, leaf, layer.to_linear(dtype))
    return len(quantized)
