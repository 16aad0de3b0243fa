"""A dense model that every engine loads: the base made dense, the adapter folded in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimtune.export.base import Source
from slimtune.lora.attach import base_of
from slimtune.quant.linear import QuantLinear


class SafetensorsExporter:
    """A Hugging Face folder without `quantization_config`: config, tokenizer, safetensors shards."""

    loads_in: ClassVar[str] = (
        "A dense Hugging Face model (a merge of `{name}` and what was trained on it).\n\n"
        "- transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)`\n"
        "- vLLM, SGLang, TGI: the folder is the model\n"
        "- llama.cpp: `convert_hf_to_gguf.py FOLDER`\n"
    )

    def write(self, source: Source, folder: Path) -> None:
        """Write merged weights in `source.dtype`, one layer at a time; `source.model` is not changed."""
        model = cast(PreTrainedModel, base_of(source.model))
        state = {name: tensor.to(source.dtype) for name, tensor in merged_state(source.model).items()}
        quantized = model.config.__dict__.pop("quantization_config", None)
        facts = {key: model.__dict__.pop(key) for key in ("hf_quantizer", "is_quantized") if key in model.__dict__}
        dtype, model.config.dtype = model.config.dtype, source.dtype
        try:
            model.save_pretrained(folder, state_dict=state)
        finally:
            model.config.dtype = dtype
            model.__dict__.update(facts)
            if quantized is not None:
                model.config.quantization_config = quantized
        source.tokenizer.save_pretrained(folder)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model that plain transformers loads."""
        auto: Any = AutoModelForCausalLM
        return cast(nn.Module, auto.from_pretrained(folder, dtype=source.dtype))

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the dense, merged model: float32 sums for layers that are quantized or adapted."""
    state: dict[str, Tensor] = {}
    inside: list[str] = []
    for name, module in base_of(model).named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        layer = cast(nn.Module, module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
        dot = f"{name}." if name else ""
        if isinstance(layer, QuantLinear) or isinstance(module, BaseTunerLayer):
            state[f"{dot}weight"] = _merged_weight(module, layer)
            if layer.bias is not None:
                state[f"{dot}bias"] = cast(Tensor, layer.bias).detach()
            continue
        for leaf, tensor in layer.named_parameters(recurse=False):
            state[dot + leaf] = tensor.detach()
        for leaf, tensor in layer.named_buffers(recurse=False):
            if leaf not in layer._non_persistent_buffers_set:
                state[dot + leaf] = tensor
    return state


@torch.no_grad()
def _merged_weight(module: nn.Module, layer: nn.Module) -> Tensor:
    if isinstance(layer, QuantLinear):
        weight = layer.dequantize(torch.float32)
    else:
        weight = cast(Tensor, layer.weight).detach().to(torch.float32, copy=True)
    if isinstance(module, BaseTunerLayer):
        for adapter in module.active_adapters:
            if adapter in cast(Any, module).lora_A:
                weight += cast(Any, module).get_delta_weight(adapter).to(torch.float32)
    return weight
