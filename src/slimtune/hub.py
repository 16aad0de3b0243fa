"""How transformers knows a slimtune folder: a quantization method in its registry.

transformers loads this module in the middle of its own imports (see `slimtune.registration`), so at the top it imports
only what is ready by then; the rest of slimtune is imported when a folder is really loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimtune.errors import FormatError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

METHOD = "slimtune"
FORMAT_VERSION = 1


class SlimtuneConfig(QuantizationConfigMixin):
    """The `quantization_config` of a slimtune folder: groups of layers that share a layout.

    Each group is `{"layout": "affine", "bits": 4, ..., "modules": [names]}`, with `"activations": {"bits": 8, ...}`
    where its layers round their inputs.
    """

    def __init__(self, version: int = FORMAT_VERSION, groups: list[dict[str, Any]] | None = None, **_: object) -> None:
        if version != FORMAT_VERSION:
            raise FormatError("unknown version of the slimtune format", got=version, wanted=FORMAT_VERSION)
        self.quant_method = cast(Any, METHOD)
        self.version = version
        self.groups = groups or []
        read: list[Any] = self.groups  # from a file: anything
        if not all(isinstance(group, dict) and isinstance(group.get("modules"), list) for group in read):
            raise FormatError("the groups of quantized layers are malformed", where="config.json", got=str(read)[:200])


class SlimtuneQuantizer(HfQuantizer):
    """Tells transformers how to load a slimtune folder: `QuantLinear`s first, then the tensors into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        for group in cast(SlimtuneConfig, self.quantization_config).groups:
            facts = {key: value for key, value in group.items() if key != "modules"}
            for name in group["modules"]:
                _allocate_(model, name, facts)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        from slimtune.quant.linear import QuantLinear
        from slimtune.quant.scattered import Scattered

        for name, module in model.named_modules():
            if isinstance(module, QuantLinear) and isinstance(module.layout, Scattered):
                module.layout.check(module.qtensor.tensors["group"], name)
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


def _allocate_(model: nn.Module, name: str, facts: dict[str, Any]) -> None:
    import torch

    from slimtune.quant.activation import activations_from_dict
    from slimtune.quant.layouts import layout_from_dict
    from slimtune.quant.linear import QuantLinear

    facts = dict(facts)
    activations = activations_from_dict(facts.pop("activations"), name) if "activations" in facts else None
    parent, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        linear = owner.get_submodule(leaf)
    except AttributeError as error:
        raise FormatError("a quantized layer is not in the model", where="config.json", got=name) from error
    if not isinstance(linear, torch.nn.Linear):
        raise FormatError("a quantized layer is not a linear", where=name, got=type(linear).__name__)
    layout = layout_from_dict(facts, linear.out_features, linear.in_features)
    try:
        quantized = QuantLinear(
            layout, linear.bias is not None, device="meta", dtype=linear.weight.dtype, activations=activations
        )
    except (TypeError, ArithmeticError, RuntimeError) as error:
        raise FormatError("a quantized layer has an impossible layout", where=name, got=facts) from error
    setattr(owner, leaf, quantized)
    # Where a module draws the weights of its linears itself (T5), transformers would draw packed codes anew.
    cast(Any, owner)._is_hf_initialized = True
