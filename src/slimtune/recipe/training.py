"""The train step on a model in memory: rows made into examples, and training with all that a recipe can ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.calib.formats import normalise
from slimtune.calib.rows import DataSource, read_rows
from slimtune.evaluate.inference import require_vocabulary
from slimtune.lora.attach import base_of
from slimtune.prune.options import PruneOptions
from slimtune.recipe.pruning import cost_of
from slimtune.train.data import Collator, Example, pack, padding_id, tokenize, tokenize_seq2seq
from slimtune.train.loop import TrainFacts, finetune
from slimtune.train.options import TrainOptions

Facts = dict[str, Any]

FITTED_WINDOWS = 8
"""Calibration windows on which a ramp fits what it keeps, at most: it does so many times."""


def train_now(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    options: TrainOptions,
    *,
    ramp: PruneOptions | None = None,
    windows: Tensor | None = None,
    **more: Any,
) -> TrainFacts:
    """Train `model` (all of it, where nothing of it is marked to train) in place; along a `ramp` it is pruned, and the
    facts say what that changed in speed and memory. `windows` `[samples, length]` are those that a ramp fits on; `more`
    are arguments of `slimtune.train.loop.finetune`, and so are the errors."""
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_(True)
    before = cost_of(model) if ramp is not None else {}
    fitted = windows[:FITTED_WINDOWS] if windows is not None else None
    collator = Collator(padding_id(tokenizer))
    result = finetune(model, examples, collator, options, prune=ramp, windows=fitted, **more)
    if result.prune is not None:
        result.prune["cost"] = {"before": before, "after": cost_of(model)}
    return result


def examples_of(
    model: nn.Module, tokenizer: Any, source: DataSource, options: TrainOptions
) -> tuple[Sequence[Example], Facts]:
    """What `model` learns from the first `samples` rows of `source`, and the facts of how it was made."""
    length, where = within_positions(model, options.max_length), str(source)
    conversations = normalise(read_rows(source)[: source.samples], where=where)
    hf = cast(Any, base_of(model))
    if hf.config.is_encoder_decoder:
        examples, facts = tokenize_seq2seq(conversations, tokenizer, length, where=where)
    else:
        examples, facts = tokenize(
            conversations, tokenizer, length, completion_only_loss=options.completion_only_loss, where=where
        )
    require_vocabulary(hf, torch.tensor([max(example.input_ids + example.labels) for example in examples]), where)
    return (pack(examples, length) if options.packing and not hf.config.is_encoder_decoder else examples), dict(facts)


def within_positions(model: nn.Module, length: int) -> int:
    """`length`, or the model's positions where it has fewer: longer examples and windows are cut there."""
    config = cast(Any, base_of(model)).config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # T5 has no limit
    return min(length, positions or length)
