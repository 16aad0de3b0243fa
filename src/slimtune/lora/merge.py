"""Folding an adapter into its base: `W + s·BA`, dense, in 16 or 32 bits; or in the few bits that the base has.

The base of the sum is the *dequantized* base the adapter was trained on, not the original weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.arch import Port, bind
from slimtune.errors import RecipeError
from slimtune.hub import cache_bits, round_cache_
from slimtune.lora.attach import adapted, base_of, has_adapter, plain
from slimtune.lora.pooled import fold_
from slimtune.quant.again import Again, AgainBlind
from slimtune.quant.apply import QuantizeFacts, dequantize_, quantize_
from slimtune.quant.base import Quantizer
from slimtune.quant.blackbox import FROZEN, BlackBox
from slimtune.quant.linear import QuantLinear
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
    if cache_bits(merged) < 16:
        round_cache_(cast(Any, merged), 16)  # as exact as its weights
    for parameter in merged.parameters():  # buffers keep their dtype: rotary frequencies need float32
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    attach_online_(merged)
    return merged


def merge_packed(
    model: nn.Module,
    *,
    tokens: Tensor | None = None,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, QuantizeFacts]:
    """The base model of a `PeftModel` with the adapter's update in its packed weights, each in the layout it had.

    `model` is consumed. Every sum `W + s·BA` is quantized again (`slimtune.quant.again`), block by block on what the
    blocks before it make of the calibration `tokens` (`[samples, length]`); without them the weights alone decide. The
    facts say what each layer lost. Layers whose adapter is pooled (`slimtune.lora.pooled`) lose nothing: it goes into
    their zero points. Dense layers are merged as by `merge`, in the dtype they had.

    Raises `RecipeError` when there is no adapter, or nothing is packed by slimtune's layouts.
    """
    layers: dict[str, nn.Module] = {}
    if has_adapter(model):
        fold_(adapted(model))
        layers = plain(model)
    old = {name: layer.qtensor for name, layer in layers.items() if isinstance(layer, QuantLinear)}
    rounding = {name: layer.activations for name, layer in layers.items() if isinstance(layer, QuantLinear)}
    if layers and (not old or any(isinstance(layer, BlackBox) for layer in layers.values())):
        raise RecipeError("there are no packed weights to merge into", remedy="merge: {} makes the model dense")
    dtype, cache = cast(torch.dtype, cast(Any, model).dtype), cache_bits(base_of(model))
    merged = merge(model, torch.float32)
    if cache < 16:
        round_cache_(cast(Any, merged), cache)

    def choose(port: Port) -> Quantizer | str:
        if port.name not in old:
            return "it was not packed"
        return AgainBlind(old[port.name]) if tokens is None else Again(old[port.name])

    facts = quantize_(
        merged,
        bind(merged),
        choose,
        activations=lambda port: rounding[port.name],
        tokens=tokens,
        batch_size=batch_size,
        progress=progress,
    )
    for module in merged.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, QuantLinear) or parameter is module.bias:
                parameter.data = parameter.data.to(dtype)
    attach_online_(merged)  # its modules are new
    return merged, facts


@torch.no_grad()
def merged_weight(module: nn.Module, layer: nn.Module) -> Tensor:
    """The float32 weight of the plain `layer`, with what an adapter in `module` adds to it."""
    if isinstance(layer, FROZEN):
        weight = layer.dequantize(torch.float32)
    else:
        weight = cast(Tensor, layer.weight).detach().to(torch.float32, copy=True)
    if module is not layer:
        tuner = cast(Any, module)
        for adapter in tuner.active_adapters:
            if adapter in tuner.lora_A:
                weight += tuner.get_delta_weight(adapter).to(torch.float32)
    return weight
