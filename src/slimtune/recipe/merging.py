"""Merging an adapter into packed weights, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

from torch import Tensor, nn

from slimtune.errors import RecipeError
from slimtune.evaluate.perplexity import perplexity
from slimtune.lora.attach import base_of
from slimtune.lora.merge import merge_packed

BATCH = 4
"""Calibration windows that run through a block together."""


def merge_low_bit(
    model: nn.Module,
    tokens: Tensor | None,
    *,
    tolerance: float,
    force: bool,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """`merge_packed`, with what it costs: perplexity on the calibration `tokens` before and after, or without tokens,
    and of an encoder-decoder, the relative squared error of the weights. `model` is consumed.

    Raises `RecipeError` where the cost is above `tolerance` and `force` is not given.
    """

    def loss_of(model: nn.Module) -> float:
        assert tokens is not None
        return perplexity(cast(Any, model), tokens.flatten(), length=tokens.shape[1]).value

    measured = tokens is not None and not cast(Any, base_of(model)).config.is_encoder_decoder
    before = loss_of(model) if measured else None
    merged, done = merge_packed(model, tokens=tokens, batch_size=BATCH, progress=progress)
    facts: dict[str, Any] = {
        "layers": [asdict(layer) for layer in done.layers],
        "bits_per_weight": done.bits_per_weight,
    }
    if before is None:
        cost, what = sum(layer.error for layer in done.layers) / len(done.layers), "relative error of the weights"
    else:
        after = loss_of(merged)
        facts |= {"perplexity_before": before, "perplexity_after": after}
        cost, what = after / before - 1, "perplexity on the calibration text rises by"
    facts["cost"] = cost
    if not force and not cost <= tolerance:
        raise RecipeError(
            "merging into packed weights loses too much",
            got=f"{what} {cost:.3g}",
            wanted=f"at most {tolerance:g}",
            remedy="force: true goes on, tolerance allows more; merge: {} keeps it all, in 16 or 32 bits",
        )
    return merged, facts
