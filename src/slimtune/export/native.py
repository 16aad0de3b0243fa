"""slimtune's own model folder: a Hugging Face folder whose quantized linears are stored as packed tensors.

`config.json` carries `quantization_config: {"quant_method": "slimtune", ...}` with the layout of every quantized layer.
After `import slimtune`, `AutoModelForCausalLM.from_pretrained` loads such a folder: transformers is told about the method
through its quantizer registry. See `docs/formats.md`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimtune.errors import FormatError
from slimtune.lora.attach import plain
from slimtune.quant.layouts import layout_from_dict, layout_to_dict
from slimtune.quant.linear import QuantLinear

METHOD = "slimtune"
FORMAT_VERSION = 1


class SlimtuneConfig(QuantizationConfigMixin):  # type: ignore[no-untyped-call]
    """The `quantization_config` of a slimtune folder: groups of layers that share a layout.

    Each group is `{"layout": "affine", "bits": 4, ..., "modules": [names]}`.
    """

    def __init__(self, version: int = FORMAT_VERSION, groups: list[dict[str, Any]] | None = None, **_: object) -> None:
        if version != FORMAT_VERSION:
            raise FormatError("unknown version of the slimtune format", got=version, wanted=FORMAT_VERSION)
        self.quant_method = cast(Any, METHOD)
        self.version = version
        self.groups = groups or []

    @classmethod
    def of(cls, model: nn.Module) -> SlimtuneConfig:
        """What the `QuantLinear`s of `model` need to be made again."""
        groups: dict[str, dict[str, Any]] = {}
        for name, module in plain(model).items():
            if isinstance(module, QuantLinear):
                facts = layout_to_dict(module.layout)
                groups.setdefault(json.dumps(facts, sort_keys=True), {**facts, "modules": []})["modules"].append(name)
        return cls(groups=list(groups.values()))


class SlimtuneQuantizer(HfQuantizer):
    """Tells transformers how to load a slimtune folder: `QuantLinear`s first, then the tensors into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        for group in cast(SlimtuneConfig, self.quantization_config).groups:
            facts = {key: value for key, value in group.items() if key != "modules"}
            for name in group.get("modules", ()):
                _allocate_(model, name, facts)
        return model

    def is_serializable(self) -> bool:
        """Yes: packed tensors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, through adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def register() -> None:
    """Make transformers know the `slimtune` method. Harmless when it does already."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SlimtuneConfig)
        register_quantizer(METHOD)(SlimtuneQuantizer)


def settle_(model: PreTrainedModel) -> None:
    """Make the model's flags say what it is: quantized by slimtune when it has `QuantLinear`s, plain otherwise."""
    config = SlimtuneConfig.of(model)
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
    """Write `model`, without any adapter on it, and its tokenizer to the existing folder `folder`."""
    settle_(model)
    state = {
        f"{name}.{leaf}" if name else leaf: tensor
        for name, module in plain(model).items()
        for leaf, tensor in _own_state(module).items()
    }
    model.save_pretrained(folder, state_dict=state, max_shard_size=shard)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    persistent = {k: b for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
    return {**{k: p.detach() for k, p in module.named_parameters(recurse=False)}, **persistent}


def _allocate_(model: nn.Module, name: str, facts: dict[str, Any]) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        linear = owner.get_submodule(leaf)
    except AttributeError as error:
        raise FormatError("a quantized layer is not in the model", where="config.json", got=name) from error
    if not isinstance(linear, nn.Linear):
        raise FormatError("a quantized layer is not a linear", where=name, got=type(linear).__name__)
    layout = layout_from_dict(facts, linear.out_features, linear.in_features)
    quantized = QuantLinear(layout, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
    setattr(owner, leaf, quantized)
