"""Which layer gets what from a quantize step: its fields, and what `layers` says differently for some names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

import torch

from slimtune.arch import ModelMap, Port
from slimtune.calib.stats import STATISTICS
from slimtune.errors import RecipeError, nearest
from slimtune.quant import QUANTIZERS, QTensor, Quantizer
from slimtune.quant.activation import Activations
from slimtune.quant.apply import Choose, Rounds, all_linear, matches
from slimtune.quant.fp8 import Fp8
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import group_width
from slimtune.recipe.schema import Quantize, Recipe, build


@dataclass(frozen=True)
class Treatment:
    """What a layer gets: a method for its weight, and how its input is rounded."""

    method: Quantizer
    activations: Activations | None

    @property
    def options(self) -> dict[str, Any]:
        """The fields of the method."""
        return {f.name: getattr(self.method, f.name) for f in fields(self.method)}  # type: ignore[arg-type]

    @property
    def group(self) -> int:
        """Input features that share a scale; -1 where all do, or the method has no groups."""
        return int(self.options.get("group_size", -1))

    def sample(self) -> QTensor:
        """What the method makes of a small weight of zeros, in one group however wide its own are, and of independent
        inputs."""
        width, stats = 64, {}
        for name in self.method.needs:
            statistic = STATISTICS[name](width, torch.device("cpu"))
            statistic.update(torch.eye(width), torch.eye(width))
            stats[name] = statistic.result()
        one_group = {"group_size": width} if "group_size" in self.options else {}
        return cast(QTensor, replace(cast(Any, self.method), **one_group)(torch.zeros(32, width), stats))

    def stored_bits(self) -> float:
        """Bits that a weight takes, scales and zero points included."""
        if not self.method.needs:  # what one row of it takes is quickly seen
            return self.method(torch.zeros(1, 4096), {}).bits_per_weight
        per_group = (16 if self.options.get("sym") else 24) / self.group if self.group > 0 else 0
        return float(self.options.get("bits", 16) + per_group)


@dataclass(frozen=True)
class Cache:
    """How attention rounds its keys and values: each head of a token on a grid of its own."""

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (*range(2, 9), 16):
            raise RecipeError("bits out of range", where="bits", got=self.bits, wanted="2 to 8, or 16 for none")


class Treatments:
    """What each layer gets. Everything that `step` says is checked when this is made.

    Where several patterns of `layers` match a name, all count, in their order: the last one has the last word on a
    field. Raises `RecipeError` on an unknown method, key or value.
    """

    def __init__(self, step: Quantize, where: str = "quantize") -> None:
        if step.method not in QUANTIZERS:
            raise RecipeError(
                "unknown method", where=f"{where}.method", got=step.method, remedy=nearest(step.method, QUANTIZERS)
            )
        self._step, self._where = step, where
        self._made: dict[tuple[str, ...], Treatment] = {}
        self.default = self._of(())
        self.cache = build(Cache, step.kv_cache, f"{where}.kv_cache") if step.kv_cache else Cache(16)
        self.all = [self.default, *(self._of((pattern,)) for pattern in step.layers)]

    def of(self, name: str) -> Treatment:
        """What the layer called `name` gets."""
        return self._of(tuple(pattern for pattern in self._step.layers if matches(name, pattern)))

    def resolved(self, seed: int) -> Quantize:
        """The step with every field of its method and of its rounding written out, and `seed` where the method's own is
        -1."""
        step, options, rounding = self._step, self.default.options, self.default.activations
        layers = {pattern: _seeded(fields, seed) for pattern, fields in step.layers.items()}
        activations = asdict(rounding) if rounding is not None else step.activations
        return replace(step, options=_seeded(options, seed), activations=activations, layers=layers)

    @property
    def choose(self) -> Choose:
        """The method of each port, or why it gets none."""
        step = self._step

        def choose(port: Port) -> Quantizer | str:
            method = self.of(port.name).method
            return all_linear(method, step.ignore)(port)

        return choose

    @property
    def rounds(self) -> Rounds:
        """How the input of each port is rounded."""
        return lambda port: self.of(port.name).activations

    def layers(self, modelmap: ModelMap) -> dict[str, QuantLinear]:
        """What becomes of the linears that get a method, by name and without data (on `meta`)."""
        ports = {p: self.of(p.name) for p in modelmap.ports if not isinstance(self.choose(p), str)}
        samples = {treatment: treatment.sample().layout for treatment in set(ports.values())}
        layers = {}
        for port, treatment in ports.items():
            layout: Any = samples[treatment]
            sizes = {"out_features": port.out_features, "in_features": port.in_features}
            if hasattr(layout, "group_size"):
                group = treatment.options.get("group_size", treatment.options.get("block_size", -1))
                sizes["group_size"] = group_width(group, port.in_features)
            rounding = treatment.activations
            layers[port.name] = QuantLinear(replace(layout, **sizes), device="meta", activations=rounding)
        return layers

    @property
    def need_data(self) -> bool:
        """Whether any layer looks at calibration text."""
        return any(t.method.needs or (t.activations is not None and t.activations.calibrated) for t in self.all)

    def _of(self, patterns: tuple[str, ...]) -> Treatment:
        if patterns not in self._made:
            step, where = self._step, self._where
            options, activations = dict(step.options), dict(step.activations)
            for pattern in patterns:
                where = f"{self._where}.layers['{pattern}']"
                values = step.layers[pattern]
                if not isinstance(values, Mapping):
                    raise RecipeError("expected keys and values", where=where, got=repr(values)[:80])
                options |= {key: value for key, value in values.items() if key != "activations"}
                activations |= _mapping(values.get("activations"), f"{where}.activations")
            rounding = build(Activations, activations, f"{where}.activations") if activations else None
            rounding = rounding if rounding is not None and rounding.bits < 16 else None
            method = build(QUANTIZERS[step.method], options, where)
            if isinstance(method, Fp8) and rounding is not None and rounding.type != "float":
                what, where = "float8 weights are multiplied with float8 inputs", f"{where}.activations"
                got, wanted = f"bits: {rounding.bits}, type: {rounding.type}", "bits: 8, type: float"
                raise RecipeError(what, where=where, got=got, wanted=wanted, remedy="say so, or use method: rtn")
            self._made[patterns] = Treatment(method, rounding)
        return self._made[patterns]


def check_patterns(step: Quantize, modelmap: ModelMap, where: str) -> None:
    """Raise `RecipeError` for a pattern of `layers` that matches no linear, or one of `ignore` that matches nothing."""
    linears, ports = ([port.name for port in some] for some in (modelmap.linears, modelmap.ports))
    for key, patterns, names in (("layers", step.layers, linears), ("ignore", step.ignore, ports)):
        wrong = [pattern for pattern in patterns if not any(matches(name, pattern) for name in names)]
        if wrong:
            remedy = nearest(wrong[0], {name.rsplit(".", 1)[-1] for name in names})
            place, wanted = f"{where}.{key}", f"like {linears[0]}"
            raise RecipeError("no layer has such a name", where=place, got=wrong[0], wanted=wanted, remedy=remedy)


def whole_rows(recipe: Recipe, modelmap: ModelMap) -> tuple[Recipe, list[str]]:
    """The recipe with whole rows for groups that are wider than every layer, which is what those are; and a warning
    about each."""
    widest, steps, told = max(port.in_features for port in modelmap.linears), list(recipe.steps), []
    for number, step in enumerate(recipe.steps):
        for key in ("group_size", "block_size"):
            if isinstance(step, Quantize) and (group := step.options.get(key, -1)) > widest:
                steps[number] = replace(step, options={**step.options, key: -1})
                what = f"no layer is as wide as {group:,} (at most {widest:,}): -1, a whole row, stands for it"
                told.append(f"steps[{number}].quantize.{key}: {what}")
    return replace(recipe, steps=tuple(steps)), told


def _seeded(options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {key: seed if (key, value) == ("seed", -1) else value for key, value in options.items()}


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError("expected keys and values", where=where, got=repr(value)[:80])
    return value
