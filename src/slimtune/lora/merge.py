"""Folding an adapter into its base: `W + s·BA`, dense, in 16 or 32 bits.

The base of the sum is the *dequantized* base the adapter was trained on, not the original weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from slimtune.errors import RecipeError
from slimtune.hub import cache_bits, round_cache_
from slimtune.lora.attach import has_adapter
from slimtune.quant.apply import dequantize_


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The base model of a `PeftModel` with the adapter's update added to its weights, all in `dtype`.

    `model` is consumed: its quantized linears become dense ones. The sums are made in float32 and rounded once to
    `dtype` (default: the model's own). Raises `RecipeError` when there is no adapter.
    """
    if not has_adapter(model):
        raise RecipeError("there is no adapter to merge", remedy="put the merge step after lora and train")
    dtype = dtype or cast(torch.dtype, cast(Any, model).dtype)
    dequantize_(model, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.float32)
    merged = cast(nn.Module, cast(Any, model).merge_and_unload(safe_merge=True))
    if cache_bits(merged) < 16:
        round_cache_(cast(Any, merged), 16)  # as exact as its weights
    for parameter in merged.parameters():  # buffers keep their dtype: rotary frequencies need float32
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    return merged
