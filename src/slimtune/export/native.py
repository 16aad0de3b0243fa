"""slimtune's own model folder: a Hugging Face folder whose quantized linears are stored as packed tensors.

`config.json` carries `quantization_config: {"quant_method": "slimtune", ...}` with the layout of every quantized layer.
After `import slimtune`, `AutoModelForCausalLM.from_pretrained` loads such a folder: transformers is told about the
method through its quantizer registry. See `docs/formats.md`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimtune.errors import RecipeError
from slimtune.export.base import own_state, write_folder
from slimtune.hub import METHOD, SlimtuneConfig, SlimtuneQuantizer, cache_bits
from slimtune.lora.attach import base_of, plain
from slimtune.quant.activation import activations_to_dict
from slimtune.quant.blackbox import BlackBox
from slimtune.quant.layouts import layout_to_dict
from slimtune.quant.linear import QuantLinear

FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What a model folder is made of; nothing in it can run code."""


def config_of(model: nn.Module) -> SlimtuneConfig:
    """What the `QuantLinear`s of `model` need to be made again."""
    groups: dict[str, dict[str, Any]] = {}
    for name, module in plain(model).items():
        if isinstance(module, QuantLinear):
            facts = layout_to_dict(module.layout)
            if module.activations is not None:
                facts["activations"] = activations_to_dict(module.activations)
            groups.setdefault(json.dumps(facts, sort_keys=True), {**facts, "modules": []})["modules"].append(name)
    bits = cache_bits(base_of(model))
    return SlimtuneConfig(groups=list(groups.values()), kv_cache={"bits": bits} if bits < 16 else None)


def settle_(model: PreTrainedModel) -> None:
    """Make the model's flags say what it is: quantized by slimtune when it has `QuantLinear`s, plain otherwise."""
    config = config_of(model)
    facts = model.__dict__
    if config.groups:
        quantizer = SlimtuneQuantizer(config)
        model.config.quantization_config = config
        facts.update(hf_quantizer=quantizer, is_quantized=True, quantization_method=METHOD)
    else:
        for fact in ("hf_quantizer", "is_quantized", "quantization_method"):
            facts.pop(fact, None)
        if "quantization_config" in model.config.__dict__:
            del model.config.quantization_config


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, shard: str = "5GB"
) -> None:
    """Write `model`, without any adapter on it, and its tokenizer to the existing folder `folder`.

    A model with black boxes is frozen, so it is a copy of the folder that it was loaded from. Raises `RecipeError`
    where it was loaded from none.
    """
    if any(isinstance(module, BlackBox) for module in plain(model).values()):
        _copy(model, folder)
        return
    settle_(model)
    state = {
        f"{name}.{leaf}" if name else leaf: tensor
        for name, module in plain(model).items()
        for leaf, tensor in own_state(module).items()
    }
    quantization = model.config.__dict__.get("quantization_config")
    write_folder(model, state, folder, dtype=model.dtype, quantization=quantization, shard=shard)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _copy(model: PreTrainedModel, folder: Path) -> None:
    source = Path(model.name_or_path or "")
    if not (source / "config.json").is_file():
        raise RecipeError(
            "layers that another package quantized can be copied, not written, and their folder is not known",
            got=model.name_or_path or "a model made in memory",
            remedy="save the adapter alone, or merge it into a dense model",
        )
    for pattern in FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
