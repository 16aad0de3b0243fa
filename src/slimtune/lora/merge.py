"""Folding an adapter into its base: `W + s·BA`, dense, in 16 or 32 bits.

The base of the sum is the *dequantized* base the adapter was trained on, not the original weights.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn

from slimtune.errors import RecipeError
from slimtune.lora.attach import base_of, has_adapter
from slimtune.quant.apply import dequantize_
from slimtune.rotate.online import attach_online_


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
    config = cast(Any, base_of(model)).config
    tied = config.tie_word_embeddings
    with warnings.catch_warnings():  # PEFT clears the flag where a head has a weight of its own; T5 always sets it
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer", category=UserWarning)
        merged = cast(nn.Module, cast(Any, model).merge_and_unload(safe_merge=True))
    config.tie_word_embeddings = tied
    for parameter in merged.parameters():  # buffers keep their dtype: rotary frequencies need float32
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    attach_online_(merged)
    return merged
