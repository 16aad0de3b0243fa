"""A dense model that every engine loads: the base made dense, the adapter folded in."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from slimtune.export.base import Source, own_state, refuse_rounding, write_folder
from slimtune.export.load import read_model
from slimtune.lora.attach import base_of, plain
from slimtune.lora.merge import merged_weight
from slimtune.quant.blackbox import FROZEN


class SafetensorsExporter:
    """A Hugging Face folder without `quantization_config`: config, tokenizer, safetensors shards."""

    loads_in: ClassVar[str] = (
        "A dense Hugging Face model (a merge of `{name}` and what was trained on it).\n\n"
        "- transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)`\n"
        "- vLLM, SGLang, TGI: the folder is the model\n"
        "- llama.cpp: export `gguf`, or `convert_hf_to_gguf.py FOLDER`\n"
    )

    def write(self, source: Source, folder: Path) -> None:
        """Write merged weights in `source.dtype`; `source.model` is not changed."""
        refuse_rounding(source.model, "safetensors")
        write_folder(source.model, merged_state(source.model, source.dtype), folder, dtype=source.dtype)
        source.tokenizer.save_pretrained(folder)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model that plain transformers loads."""
        return read_model(folder, source.dtype)

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""


def merged_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of the dense, merged model in `dtype`, summed in float32 one layer at a time."""
    state: dict[str, Tensor] = {}
    base = base_of(model)
    for name, layer in plain(model).items():
        module = base.get_submodule(name)
        tensors = own_state(layer, dtype)
        if isinstance(layer, FROZEN):
            tensors = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in layer.names}
        if isinstance(layer, FROZEN) or isinstance(module, BaseTunerLayer):
            tensors["weight"] = merged_weight(module, layer).to(dtype)
        state.update({f"{name}.{leaf}" if name else leaf: tensor for leaf, tensor in tensors.items()})
    return state
