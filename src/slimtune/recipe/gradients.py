"""The gradients that an adapter starts from: batches as the training to come will see them, and their sketch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from slimtune.arch import ModelMap, bind
from slimtune.calib.gradients import Batch, GradientSketch, learnt_tokens, model_loss
from slimtune.calib.loss import chunked_loss
from slimtune.errors import CalibrationError, RecipeError
from slimtune.evaluate.inference import inference
from slimtune.files import require_place
from slimtune.lora.attach import add_lora, base_of, basis_of, sketch_targets, targets_of
from slimtune.lora.inits import INITS, WORDS, Knobs
from slimtune.lora.options import ALL_OR_DEFAULT, DEFAULT_TOKENS, LoraOptions
from slimtune.lora.ranks import allocate
from slimtune.lora.search import Search, line_search
from slimtune.lora.start import StartFact
from slimtune.train.data import Collator, Example

SEARCHED = 2048
"""Learnt tokens on which the size of a start is searched."""


def wants_gradients(options: LoraOptions) -> bool:
    """Whether an adapter with these options starts from gradients or moments, or is shaped by them."""
    return bool(INITS[options.init].directions) or options.ranks == "gradient"


def searches(options: LoraOptions) -> bool:
    """Whether the size of the start is searched, on data."""
    return INITS[options.init].searched and not options.init_gamma


def sketch_file(options: LoraOptions) -> Path | None:
    """The file that a sketch is read from or written to, where these options name one."""
    return Path(options.init_sketch).expanduser() if options.init_sketch else None


def wants_data(options: LoraOptions, file: Path | None) -> bool:
    """Whether an adapter with these options looks at data itself: its sketch may lie in `file` already."""
    return searches(options) or (wants_gradients(options) and not (file is not None and file.exists()))


def directions_of(options: LoraOptions) -> int:
    """The singular triples of a layer that these options need."""
    return max(1, INITS[options.init].directions) * options.r * (2 if options.ranks == "gradient" else 1)


def require_sketch(options: LoraOptions, modelmap: ModelMap | None, where: str = "") -> None:
    """Raise what reading or writing the file of the sketch would end with, before anything is done; as far as that is
    known, where there is no map of the model yet."""
    if (file := sketch_file(options)) is None:
        return
    if file.exists():
        found = GradientSketch.load(file)
        if modelmap is not None:
            fitted(found, options, modelmap, f"{where}.init_sketch")
    else:
        require_place(file)


def fitted(
    gradients: GradientSketch, options: LoraOptions, modelmap: ModelMap, where: str = "", *, basis: str | None = None
) -> GradientSketch:
    """What `gradients` holds of the layers that an adapter with these options goes to.

    Raises `RecipeError` where that is of something else than the init looks at, not there, of another shape, or of
    fewer directions than are needed.
    """
    of, wanted, layers = INITS[options.init].of, directions_of(options), {}
    remedy = "take another sketch: name a file that does not exist yet"
    if basis is not None and gradients.basis != basis:
        got, here = (f"rotation {one[:12]}" if one else "no rotation" for one in (gradients.basis, basis))
        raise RecipeError("the sketch is of another basis", where=where, got=got, wanted=here, remedy=remedy)
    if gradients.of != of:
        what, got = "the sketch is of something else", WORDS[gradients.of]
        raise RecipeError(what, where=where, got=got, wanted=WORDS[of], remedy=remedy)
    for name in targets_of(modelmap, options.target_modules):
        port = modelmap[name]
        shape = port.in_features if of == "inputs" else port.out_features, port.in_features
        if (known := gradients.layers.get(name)) is None:
            raise RecipeError("the sketch lacks a layer of the adapter", where=where, got=name, remedy=remedy)
        if (found := (len(known.triples.u), len(known.triples.v))) != shape:
            what, got = "the sketch is of another model", f"{name}: {list(found)}"
            raise RecipeError(what, where=where, got=got, wanted=str(list(shape)), remedy=remedy)
        if (count := len(known.triples.s)) < (needed := min(wanted, *shape)):
            what, got = "the sketch knows too few directions", f"{name}: {count}"
            raise RecipeError(what, where=where, got=got, wanted=f"{needed} for r: {options.r}", remedy=remedy)
        layers[name] = known
    return replace(gradients, layers=layers, unreached=tuple(name for name in gradients.unreached if name in layers))


def wants_residual(options: LoraOptions) -> bool:
    """Whether an adapter with these options gives back what quantization lost."""
    return INITS[options.init].start is not None or options.init_residual


def attach_adapter(
    model: nn.Module,
    options: LoraOptions,
    gradients: GradientSketch | None,
    batches: Sequence[Batch] = (),
    *,
    base_name: str = "",
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """`model` with the adapter that `options` describe, and facts for the report: each layer's start, and the ranks.

    A start that changes the model and has no size given is as large as serves the loss on the first of `batches` best,
    where there are any. Raises `RecipeError` where `gradients` do not fit the model or the options.
    """
    starts: list[StartFact] = []
    ranks: dict[str, int] | None = None
    if gradients is not None and not wants_gradients(options):
        gradients = None
    if gradients is not None:
        modelmap = bind(model)
        gradients = fitted(gradients, options, modelmap, "lora", basis=basis_of(model))
        if options.ranks == "gradient":
            ports = {name: modelmap[name] for name in gradients.layers}
            ranks = allocate(gradients, options.r, {n: p.in_features + p.out_features for n, p in ports.items()})
    wrapped = add_lora(
        model,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        use_rslora=options.use_rslora,
        init=options.init,
        knobs=Knobs(options.init_direction, options.init_scale, options.init_target, options.init_gamma),
        gradients=gradients,
        ranks=ranks,
        keep_residual=options.init_residual,
        pooled=options.pooled,
        base_name=base_name,
        seed=seed,
        facts=starts.extend,
    )
    facts: dict[str, Any] = {}
    if searches(options) and batches:
        found = search_start_(wrapped, batches)
        starts = [replace(fact, ratio=fact.ratio * found.size) for fact in starts]
        facts["search"] = found.to_dict()
    if ranks is not None:
        facts["ranks"] = ranks
    if gradients is not None:
        facts["gradients"] = sketch_facts(gradients)
    if starts:
        facts["layers"] = [fact.to_dict() for fact in starts]
    return wrapped, facts


@torch.no_grad()
def search_start_(model: nn.Module, batches: Sequence[Batch]) -> Search:
    """Multiply every B by the one number that is best for the mean loss on the first of `batches`, and say which.

    Looks at `SEARCHED` learnt tokens, or all there are. Where no step helps it is 0, and the model is as it was.
    """
    factors = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_B." in name]
    whole, hf = [factor.detach().clone() for factor in factors], cast(Any, base_of(model))
    chosen: list[tuple[Batch, int]] = []
    for batch in batches:
        if sum(count for _, count in chosen) >= SEARCHED:
            break
        chosen.append(({key: value.to(hf.device) for key, value in batch.items()}, learnt_tokens(hf, batch)))

    def set_(size: float) -> None:
        for factor, start in zip(factors, whole, strict=True):
            factor.copy_(start * size)

    def loss(size: float) -> float:
        set_(size)
        total = sum(float(model_loss(hf, batch)) * count for batch, count in chosen)
        return total / max(sum(count for _, count in chosen), 1)

    with inference(hf), chunked_loss(base_of(model)):
        found = line_search(loss)
    set_(found.size)
    return found


def gradient_batches(
    examples: Sequence[Example], collator: Collator, options: LoraOptions, batch_size: int, seed: int, where: str = ""
) -> list[Batch]:
    """Batches of `examples`, drawn by `seed`, until `init_tokens` of them are learnt; alike in length in a batch.

    Raises `CalibrationError` where there are fewer than the options ask for (by default, all there are are enough).
    """
    wanted = DEFAULT_TOKENS if options.init_tokens == ALL_OR_DEFAULT else options.init_tokens
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[Example] = []
    learnt = 0
    for index in order:
        if learnt >= wanted:
            break
        chosen.append(examples[index])
        learnt += sum(label >= 0 for label in examples[index].labels)
    if learnt < wanted and options.init_tokens != ALL_OR_DEFAULT:
        raise CalibrationError(
            "the training data is shorter than what the init asks for",
            where=where,
            got=f"{learnt:,} learnt tokens",
            wanted=f"{wanted:,}",
            remedy="lower init_tokens",
        )
    chosen.sort(key=lambda example: len(example.input_ids))
    chunks = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    batches = [collator(chunk) for chunk in chunks]
    return [batches[i] for i in torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()]


def gradients_of(
    model: nn.Module,
    batches: Sequence[Batch],
    options: LoraOptions,
    *,
    seed: int = 0,
    checkpointing: bool = False,
    file: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GradientSketch:
    """The sketch that `options` need, of the mean loss over `batches`; or where `file` exists, what that holds.
    Where it does not, it is written.

    `checkpointing` recomputes the activations of each block in the backward pass, as the training to come does.
    """
    if file is not None:
        if file.exists():
            return GradientSketch.load(file)
        require_place(file)
    with _checkpointing(base_of(model), checkpointing):
        found = sketch_targets(
            model,
            batches,
            directions=directions_of(options),
            of=INITS[options.init].of,
            target_modules=options.target_modules,
            keep_residual=options.init_residual,
            passes=options.init_passes,
            seed=seed,
            tolerance=options.init_tolerance,
            progress=progress,
        )
    if file is not None and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        found.save(file)  # every process has the same
    return found


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    hf = cast(Any, model)
    if not wanted or hf.is_activation_checkpointing:
        yield
        return
    hf.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        hf.activation_checkpointing_disable()


def sketch_facts(gradients: GradientSketch) -> dict[str, Any]:
    """Plain values for `report.json`: what was looked at, and what it cost."""
    known = [layer.overlap for layer in gradients.layers.values() if layer.overlap is not None]
    energies = [layer.energy for layer in gradients.layers.values()]
    return {
        "of": gradients.of,
        "tokens": gradients.tokens,
        "batches": gradients.batches,
        "passes": gradients.passes,
        "directions": gradients.directions,
        "loss": gradients.loss,
        "mean_energy": sum(energies) / len(energies),
        "mean_overlap": sum(known) / len(known) if known else None,
        "stable": gradients.stable,
        "held_bytes": gradients.held_bytes,
        "unreached": list(gradients.unreached),
    }
