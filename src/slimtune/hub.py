"""How transformers knows a slimtune folder: a quantization method in its registry.

transformers loads this module in the middle of its own imports (see `slimtune.registration`), so at the top it imports
only what is ready by then; the rest of slimtune is imported when a folder is really loaded.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimtune.errors import FormatError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

METHOD = "slimtune"
FORMAT_VERSION = 1
CACHE = "slimtune_cache_"
TURNED = "_turned"
ROUNDED = "_slimtune_rounded"


class SlimtuneConfig(QuantizationConfigMixin):
    """The `quantization_config` of a slimtune folder: groups of layers that share a layout.

    Each group is `{"layout": "affine", "bits": 4, ..., "modules": [names]}`, with `"activations": {"bits": 8, ...}`
    where its layers round their inputs. `kv_cache`, where there is one, is `{"bits": 8}`.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        groups: list[dict[str, Any]] | None = None,
        kv_cache: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        if version != FORMAT_VERSION:
            raise FormatError("unknown version of the slimtune format", got=version, wanted=FORMAT_VERSION)
        self.quant_method = cast(Any, METHOD)
        self.version = version
        self.groups = groups or []
        if kv_cache is not None:  # else the key is absent from the file
            self.kv_cache = kv_cache
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
        cache: Any = self.quantization_config.__dict__.get("kv_cache")
        if cache is not None:
            if not isinstance(cache, dict) or cache.keys() != {"bits"} or cache["bits"] not in range(2, 9):
                raise FormatError("a cache is rounded in an unknown way", where="config.json, kv_cache", got=cache)
            round_cache_(model, cache["bits"])
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


def round_cache_(model: PreTrainedModel, bits: int) -> None:
    """Let the attention of `model` read keys and values rounded to `bits` bits, as from a cache that holds no more; 16
    lets it read them as they are.

    Each head of a token has an asymmetric grid of its own, after rotary embeddings, where caches lie. In floats, for
    every token, in prefill and decoding alike: what a cache in so few bits costs is seen;
    `slimtune.evaluate.packed_cache` saves its bytes. Of a model with images the language model alone is rounded. Where
    the model is rotated with `r3`, queries and keys are turned first, alike, by a Hadamard transform of each head (R3
    of SpinQuant, arXiv 2405.16406): their products stay, and the keys have no outliers when they are rounded. Raises
    `RecipeError` where a model does not call its attention by name.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config
    turned = "r3" in (config.__dict__.get("slimtune_rotation") or {}).get("online", ())
    now = str(config.get_text_config()._attn_implementation)
    plain = now.partition(":")[2] if now.startswith(CACHE) else now
    name = plain if bits == 16 else f"{CACHE}{bits}{TURNED * turned}:{plain}"
    if bits < 16 and name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend, bits, turned, plain))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    try:
        model.set_attn_implementation({"text_config": name} if "text_config" in config.sub_configs else name)
    except ValueError as error:
        raise RecipeError("the cache of this model cannot be rounded", where="kv_cache", got=str(error)) from error


def cache_bits(model: nn.Module) -> int:
    """What `round_cache_` rounds keys and values of `model` to; 16 where it does not."""
    name = str(cast(Any, model).config.get_text_config()._attn_implementation)
    return int(name.removeprefix(CACHE).partition(":")[0].removesuffix(TURNED)) if name.startswith(CACHE) else 16


def cache_is_turned(model: nn.Module) -> bool:
    """Whether keys are turned before `round_cache_` rounds them."""
    name = str(cast(Any, model).config.get_text_config()._attn_implementation)
    return name.startswith(CACHE) and name.partition(":")[0].endswith(TURNED)


def mark_rounded(keys: Tensor) -> Tensor:
    """`keys`, which attention then takes as they are, and their values: rounded, and turned where they are to be."""
    setattr(keys, ROUNDED, True)
    return keys


def _attend(
    bits: int,
    turned: bool,
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> Any:
    """The attention called `plain` on rounded keys and values, `[batch, heads, tokens, width]`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from slimtune.quant.activation import Activations
    from slimtune.rotate.turn import keys_turn

    done = getattr(key, ROUNDED, False)
    if turned:
        turn = keys_turn(key.shape[-1]).like(key)
        query, key = turn(query), key if done else turn(key)
    rounding = Activations(16 if done else bits, sym=False)
    # Eager attention has no name: each architecture has its own.
    own: Any = sys.modules[type(module).__module__]
    attend = own.eager_attention_forward if plain == "eager" else ALL_ATTENTION_FUNCTIONS[plain]
    return attend(module, query, rounding(key), rounding(value), *args, **options)


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


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(SlimtuneConfig)
    register_quantizer(METHOD)(SlimtuneQuantizer)
