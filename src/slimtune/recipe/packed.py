"""Weights in few bits, before any are there: what a folder's configuration says of them, and what a recipe asks of
them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from slimtune.arch import ModelMap
from slimtune.errors import RecipeError, SlimtuneError
from slimtune.export import compressed_tensors, gptq
from slimtune.export.config_groups import CompressedTensors
from slimtune.export.foreign import PackedFormat, packed_format
from slimtune.hub import METHOD, SlimtuneConfig
from slimtune.lora.pooled import NO_GROUPS, poolable
from slimtune.quant.activation import activations_from_dict
from slimtune.quant.layouts import layout_from_dict
from slimtune.quant.linear import QuantLinear
from slimtune.quant.tuning import tunable, untunable
from slimtune.recipe.adapters import ports_of
from slimtune.recipe.legality import State
from slimtune.recipe.schema import Export, Lora, Merge, Prune, Quantize, Recipe, Step, Train
from slimtune.recipe.treatments import Treatments
from slimtune.rotate.options import FOLDED, Rotation
from slimtune.rotate.record import KEY

Layers = Mapping[str, QuantLinear]
"""Packed linears by name, without data (on `meta`)."""

DECODING = {"e8p": 7, "trellis": 7}
"""Bytes a weight while a layer in this layout is decoded to bfloat16, the result among them (measured on
8192 x 5504); twice the result in all others."""

HOLDS = dict.fromkeys(("compressed-tensors", "vllm"), compressed_tensors.fault_of) | {"gptq": gptq.fault_of}
"""Why a packed format cannot hold weights of a layout."""


def start_of(config: Any) -> State:
    """What is known of the model of this configuration before the first step."""
    noted = config.__dict__.get(KEY, {})
    turned = Rotation(online=tuple(noted.get("online", ())), block_size=noted.get("block_size", 0))
    online = tuple(name for name in turned.online if name in FOLDED)
    facts, rounded, cache, fractions = _facts(config), False, False, False
    if facts is not None and facts.get("quant_method") == METHOD:
        groups = SlimtuneConfig(**facts).groups
        rounded, cache = any("activations" in group for group in groups), facts.get("kv_cache") is not None
        fractions = any(group.get("float_zero") for group in groups)
    elif isinstance(format := _format(config, facts), CompressedTensors):
        rounded = any(group.inputs is not None for group in format.groups.values())
    return State(
        facts is not None,
        rotated=bool(noted),
        online=online,
        leaves=turned.leaves,
        rounded=rounded,
        cache=cache,
        fractions=fractions,
    )


def layers_of(config: Any, modelmap: ModelMap) -> Layers:
    """The packed linears of the folder with this configuration, where slimtune wrote it; else none."""
    facts = _facts(config)
    if facts is None or facts.get("quant_method") != METHOD:
        return {}
    packed = {name: group for group in facts["groups"] for name in group["modules"]}
    layers = {}
    for port in modelmap.linears:
        if port.name in packed:
            told = {key: value for key, value in packed[port.name].items() if key != "modules"}
            rounding = told.pop("activations", None)
            activations = activations_from_dict(rounding, port.name) if rounding is not None else None
            layout = layout_from_dict(told, port.out_features, port.in_features)
            layers[port.name] = QuantLinear(layout, device="meta", activations=activations)
    return layers


def held(config: Any, modelmap: ModelMap) -> dict[str, Any]:
    """What a folder that is quantized already says of the memory that its linears take."""
    facts = _facts(config)
    if facts is None:
        return {}
    if facts.get("quant_method") != METHOD:
        if isinstance(_format(config, facts), CompressedTensors):
            groups = facts["config_groups"].values()
            return {"bits": max((group["weights"]["num_bits"] for group in groups), default=16)}
        bits, group = facts.get("bits"), facts.get("group_size") or -1
        return {"bits": bits + (24 / group if group > 0 else 0)} if isinstance(bits, int) else {}
    layers, size = layers_of(config, modelmap), 0.0
    for port in modelmap.linears:
        if port.name in layers:
            stored = layers[port.name].layout.tensors().values()
            size += sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)
        else:
            size += 2 * port.in_features * port.out_features
    decoding = max((DECODING.get(layer.layout.tag, 0) for layer in layers.values()), default=0)
    return {"bits": 8 * size / sum(p.in_features * p.out_features for p in modelmap.linears), "decoding": decoding}


def check_packable(step: Quantize, recipe: Recipe, number: int, model: Any, modelmap: ModelMap) -> None:
    """Packed formats hold affine weights without a shorter last group, and what later steps want to train must be
    there: say so before hours of work, not after."""
    where = f"steps[{number}].{step.name}"
    treatments = Treatments(step, where)
    packed = [s.format for _, s in _later(recipe, number) if isinstance(s, Export) and s.format in HOLDS]
    for kind in packed:
        for treatment in treatments.all:
            if fault := HOLDS[kind](treatment.sample().layout):
                raise RecipeError(
                    f"{kind} cannot hold what this method makes",
                    where=f"{where}.method",
                    got=f"{step.method}: {fault}",
                    remedy="use rtn or optq, or export safetensors",
                )
    for treatment in treatments.all if {"compressed-tensors", "vllm"}.intersection(packed) else ():
        if fault := compressed_tensors.fault_of_rounding(treatment.activations):
            raise RecipeError(
                "compressed-tensors cannot say how inputs are rounded",
                where=f"{where}.activations",
                got=fault,
                remedy="use one range a token or layer, or the model folder",
            )
    groups = {p.name: treatments.of(p.name).group for p in modelmap.linears}
    ragged = [p for p in modelmap.linears if 0 < groups[p.name] < p.in_features and p.in_features % groups[p.name]]
    if packed and ragged:
        names = ", ".join(p.name for p in ragged[:3])
        raise RecipeError(
            f"the group size does not divide every layer, which {packed[0]} needs",
            where=f"{where}.group_size",
            got=f"{groups[ragged[0].name]}; {names}{' ...' if len(ragged) > 3 else ''}",
            remedy="use a group size that does, or -1 (whole rows), or export safetensors",
        )
    check_later(treatments.layers(modelmap), recipe, number, model, modelmap)


def check_later(layers: Layers, recipe: Recipe, number: int, model: Any, modelmap: ModelMap) -> None:
    """Raise `SlimtuneError` where a step after the `number`th asks of packed `layers` what they do not have; nothing is
    known of none."""
    layouts = [layer.layout for layer in layers.values()]
    for later, step in _later(recipe, number) if layers else ():
        where, kinds = f"steps[{later}].{step.name}", ", ".join(sorted({layout.tag for layout in layouts}))
        match step:
            case Train(scales=True) if not any(map(tunable, layouts)):
                what, remedy = "there are no scales to train", untunable(layouts)
                raise RecipeError(what, where=f"{where}.scales", got=f"layout: {kinds}", remedy=remedy)
            case Lora(pooled=True):
                adapted = [p.name for p in ports_of(step, model, modelmap)]
                if not any(name in layers and poolable(layers[name].layout) for name in adapted):
                    what, remedy = NO_GROUPS
                    raise RecipeError(what, where=f"{where}.pooled", got=f"layout: {kinds}", remedy=remedy)
            case Export() if step.format in HOLDS:
                _require_held(step.format, {} if _cut(recipe, later) else layers, where)
                if step.format != "gptq":
                    try:
                        compressed_tensors.schemes_of(dict(layers))
                    except SlimtuneError as error:
                        raise error.within(where) from error


def _require_held(kind: str, layers: Layers, where: str) -> None:
    """Raise `RecipeError` where a packed format cannot hold a layer."""
    for name, layer in layers.items():
        if fault := HOLDS[kind](layer.layout):
            remedy = "export safetensors, or use the model folder"
            raise RecipeError(f"{kind} cannot hold this layer", where=where, got=f"{name}: {fault}", remedy=remedy)


def _cut(recipe: Recipe, number: int) -> bool:
    """Whether layers have other sizes by the `number`th step."""
    return any(isinstance(step, Prune) for step in recipe.steps[:number])


def _later(recipe: Recipe, number: int) -> Iterator[tuple[int, Step]]:
    """The steps after the `number`th, with their numbers, as long as its packed weights are there."""

    def mine(pair: tuple[int, Step]) -> bool:
        step = pair[1]
        return not isinstance(step, Quantize) and not (isinstance(step, Merge) and not step.keep_bits)

    return takewhile(mine, list(enumerate(recipe.steps))[number + 1 :])


def _facts(config: Any) -> Mapping[str, Any] | None:
    """The `quantization_config` of a configuration, where it has one."""
    facts = config.__dict__.get("quantization_config")
    return facts if isinstance(facts, Mapping) or facts is None else facts.to_dict()


def _format(config: Any, facts: Mapping[str, Any] | None) -> PackedFormat | None:
    return packed_format(facts, rotated=KEY in config.__dict__) if facts is not None else None
