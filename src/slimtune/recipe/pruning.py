"""The prune step: at once, or along the train step that follows; and the record of what was kept, `pruning.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Space, bind
from slimtune.errors import FormatError, RecipeError, nearest
from slimtune.evaluate.speed import speed
from slimtune.lora.attach import base_of, plain
from slimtune.prune import IMPORTANCES, Importance
from slimtune.prune.biases import give_biases_
from slimtune.prune.collect import collect
from slimtune.prune.groups import axes, parameters
from slimtune.prune.latency import latency
from slimtune.prune.options import PruneOptions
from slimtune.prune.probe import require_adapters
from slimtune.prune.refit import refit_
from slimtune.prune.removal import MEASURED
from slimtune.prune.select import select
from slimtune.prune.surgery import PruneFacts, PrunePlan, prune_, require_cuttable
from slimtune.quant.size import model_size
from slimtune.recipe.schema import Prune, Step, Train

RECORD = "pruning.json"
PROMPT, REPLY = 64, 8
"""Tokens read and written to measure what pruning changed: few, since it is done in passing."""

Facts = dict[str, Any]
Progress = Callable[[int, int], None]


def importance_of(options: PruneOptions, where: str = "prune") -> Importance:
    """The measure that `options` names. Raises `RecipeError` on an unknown name, or one that cannot act as asked."""
    if options.importance not in IMPORTANCES:
        remedy = nearest(options.importance, IMPORTANCES)
        raise RecipeError("unknown importance", where=f"{where}.importance", got=options.importance, remedy=remedy)
    importance = IMPORTANCES[options.importance]()
    if "influence" in importance.needs and options.targets != ("layers",):
        raise RecipeError(
            "only whole layers have an influence",
            where=f"{where}.targets",
            got=", ".join(options.targets),
            remedy="use targets: layers, or another importance",
        )
    if importance.needs & MEASURED and options.ramped:
        raise RecipeError(
            "this importance runs the model without each unit, which a ramp cannot do at every step",
            where=f"{where}.importance",
            got=options.importance,
            remedy="use schedule: one-shot, or importance: gate-fisher",
        )
    return importance


def needs_data(options: PruneOptions) -> bool:
    """Whether calibration text is looked at (a ramp scores on what it trains on, and fits on this)."""
    return options.refit or options.bias or (not options.ramped and bool(importance_of(options).needs - {"noise"}))


def pending(steps: Sequence[Step], number: int) -> Prune | None:
    """The prune step whose ramp acts in train step `number`, if there is one."""
    for step in reversed(steps[:number]):
        if isinstance(step, Prune):
            return step if step.ramped else None
        if isinstance(step, Train):
            return None
    return None


def rehearse(
    options: PruneOptions, modelmap: ModelMap, where: str, adapted: Collection[str] | None = None
) -> PrunePlan:
    """A way to prune as much as `options` ask for, whatever the scores will say.

    Raises `RecipeError` where the model has nothing of the kind to prune, or not as much, or where the ports `adapted`
    (None: not known) do not do for the importance: before any work.
    """
    try:
        found = axes(modelmap, cast(Any, options.targets))
        if adapted is not None:
            require_adapters(found, importance_of(options), adapted)
        scores = {axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in found}
        remove = options.ratio * parameters(modelmap, options.of)
        whole = any(axis.whole for axis in found)
        return PrunePlan(found, select(modelmap, found, scores, remove, step=options.multiple_of, allocated=whole))
    except RecipeError as error:
        raise error.within(where) from error


def biased(model: nn.Module, options: PruneOptions, where: str = "prune") -> tuple[ModelMap, int]:
    """The map of `model`, whose sub-layers are given the biases that `options` ask for, and how many these are."""
    modelmap = bind(model)
    if not options.bias:
        return modelmap, 0
    try:
        count = give_biases_(base_of(model), modelmap, axes(modelmap, cast(Any, options.targets)))
    except RecipeError as error:
        raise error.within(where) from error
    return bind(model), count


def prune_now(
    model: nn.Module, options: PruneOptions, tokens: Tensor | None, *, seed: int = 0, progress: Progress | None = None
) -> Facts:
    """Prune `model` (a Hugging Face model, with or without an adapter) in place, at once; returns the facts, with the
    units `kept` of each axis."""
    base, importance = base_of(model), importance_of(options)
    require_cuttable(base, axes(bind(model), cast(Any, options.targets)))
    modelmap, biases = biased(base, options)
    found = axes(modelmap, cast(Any, options.targets))
    normalise: Any = options.normalise
    times = latency(base, modelmap, found, seed) if options.per == "microsecond" else None
    scores = collect(base, modelmap, found, importance, tokens, normalise=normalise, seed=seed, progress=progress)
    kept = select(
        modelmap,
        found,
        scores,
        options.ratio * parameters(modelmap, options.of),
        step=options.multiple_of,
        additive=importance.additive,
        allocated=options.widths == "allocated",
        latency=times,
    )
    plan = PrunePlan(found, kept, options.ratio, options.of)
    lost = {}
    if options.refit or options.bias:
        lost = refit_(base, modelmap, plan, cast(Tensor, tokens), fit=options.refit)
    cut: PruneFacts = prune_(base, modelmap, plan)
    facts = {**cut.to_dict(), "parameters_before": cut.parameters_before - biases}
    fitted = {"lost": [{"name": name, "share": share} for name, share in lost.items()]} if lost else {}
    timed = {"latency": times} if times else {}
    return {**facts, **fitted, **timed, "kept": {name: list(units) for name, units in kept.items()}}


def cost_of(model: nn.Module) -> Facts:
    """What it takes to run `model` as it is, adapter aside: bytes, and tokens a second on a short prompt."""
    plain_model, modelmap = cast(Any, base_of(model)), bind(model)
    size = model_size(plain(model), frozenset(port.name for port in modelmap.linears))
    positions = getattr(plain_model.config.get_text_config(), "max_position_embeddings", None) or PROMPT
    measured = speed(plain_model, prompt_tokens=max(1, min(PROMPT, positions - REPLY)), new_tokens=REPLY)
    keys = 2 * modelmap.sizes.get(Space.KV_HEAD, modelmap.sizes[Space.HEAD]) * plain_model.dtype.itemsize
    return {
        "bytes": size.bytes,
        "cache_bytes_per_token": keys * sum(block.stack == modelmap.blocks[-1].stack for block in modelmap.blocks),
        "prefill_tokens_per_second": measured.prefill_tokens_per_second,
        "decode_tokens_per_second": measured.decode_tokens_per_second,
    }


def record(facts: Facts, before: Facts | None, base: str, folder: Path | None) -> Facts:
    """What `pruning.json` says: the model it began with, and what each pruning since then kept of the one before it.

    `before` is the record of the model that was pruned now, where it had one; `folder` holds the base's weights.
    """
    axes = [
        {"name": axis["name"], "kind": axis["kind"], "units": axis["units"], "kept": facts["kept"][axis["name"]]}
        for axis in facts["axes"]
    ]
    begun = {"version": 1, "base": base, "base_sha256": "", "base_parameters": facts["parameters_before"]}
    if before is None:
        begun["base_sha256"] = _digest(folder)
    first = {key: before[key] for key in begun} if before else begun
    done = {"ratio": facts["ratio"], "of": facts["of"], "removed_ratio": facts["removed_ratio"]}
    prunings = [*(before["prunings"] if before else ()), {**done, "padded": facts["padded"], "axes": axes}]
    return {**first, "parameters": facts["parameters_after"], "prunings": prunings}


def read_record(folder: Path) -> Facts | None:
    """The record in a model folder, if it is a pruned model's. Raises `FormatError` when it is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        facts: Facts = json.loads(path.read_text(encoding="utf-8"))
        keys = ("version", "base", "base_sha256", "base_parameters", "parameters", "prunings")
        return {key: facts[key] for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError("the record of a pruned model is damaged", where=str(path), remedy="delete it") from error


def _digest(folder: Path | None) -> str:
    """SHA-256 over the weight files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()
