"""The gradients that an adapter starts from: batches as the training to come will see them, and their sketch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from slimtune.calib.gradients import Batch, GradientSketch, learnt_tokens, model_loss
from slimtune.calib.loss import chunked_loss
from slimtune.errors import CalibrationError
from slimtune.evaluate.inference import inference
from slimtune.lora.attach import add_lora, base_of, sketch_targets
from slimtune.lora.inits import INITS, Knobs
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
    where there are any.
    """
    starts: list[StartFact] = []
    ranks = allocate(gradients, options.r) if gradients is not None and options.ranks == "gradient" else None
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
    if INITS[options.init].searched and not options.init_gamma and batches:
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
    progress: Callable[[int, int], None] | None = None,
) -> GradientSketch:
    """The sketch that `options` need, of the mean loss over `batches`.

    `checkpointing` recomputes the activations of each block in the backward pass, as the training to come does.
    """
    rank = 2 * options.r if options.ranks == "gradient" else options.r
    with _checkpointing(base_of(model), checkpointing):
        return sketch_targets(
            model,
            batches,
            directions=max(1, INITS[options.init].directions) * rank,
            of=INITS[options.init].of,
            target_modules=options.target_modules,
            keep_residual=options.init_residual,
            passes=options.init_passes,
            seed=seed,
            tolerance=options.init_tolerance,
            progress=progress,
        )


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
