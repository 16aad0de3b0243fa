"""What an exporter is, and what every export has in common: written whole, explained, read back and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimtune.arch import family_of
from slimtune.calib.capture import model_inputs
from slimtune.errors import FormatError
from slimtune.hub import cache_bits
from slimtune.kernels.dispatch import reference
from slimtune.lora.attach import base_of, plain
from slimtune.quant.linear import QuantLinear
from slimtune.rotate.record import KEY, fingerprint, rotation_of, write_rotation


@dataclass(frozen=True)
class Source:
    """What is exported: a model (a `PeftModel` where there is an adapter), its tokenizer, the base's public name,
    the dtype of dense weights, and what the README says beside."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    dtype: torch.dtype = torch.float32
    note: str = ""


@dataclass(frozen=True)
class Manifest:
    """What an export wrote. `max_logit_difference` compares what was read back with what was exported; `facts` are the
    exporter's own."""

    format: str
    path: str
    files: tuple[str, ...]
    bytes: int
    max_logit_difference: float
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `report.json`."""
        values = asdict(self)
        return values.pop("facts") | values


@dataclass(frozen=True)
class Written:
    """What an exporter may say of what it wrote: `facts` for the report, the `dtype` whose rounding explains how far
    logits may move, and a `note` for the README, which may name the `{difference}` that was found. No dtype: it
    quantized or cut, and compares the weights itself when it reads them back."""

    facts: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    note: str = ""


class Exporter(Protocol):
    """One format. `loads_in` says which engines load it, and how: it becomes the export's README."""

    loads_in: ClassVar[str]

    def write(self, source: Source, folder: Path) -> Written | None:
        """Write the files of the format into the empty folder `folder`. None: dense weights are in `source.dtype`, and
        there is nothing to tell."""

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model that a user of the format gets from `folder`, for comparison. May be `source`'s own with the
        written adapter on it."""

    def restore_(self, source: Source) -> None:
        """Undo what `read_back` did to `source`'s own model, where it did something."""


def basis_note(model: nn.Module, name: str, *, adapter: bool) -> str:
    """What the README of an export says where `model`, made of the one called `name`, is rotated; `adapter`: the
    format has the adapter alone, which has left the basis. Empty where nothing is rotated."""
    basis = rotation_of(model)
    if basis is None:
        return ""
    how = f"{basis.rotation.kind}, seed {basis.rotation.seed}, sha256 {fingerprint(basis)[:12]}"
    if adapter:
        return (
            f"\nThe run rotated its model ({how}). This adapter is in the basis of the original one: it fits `{name}`"
            " and files made from that, and not the run's own model.\n"
        )
    return (
        f"\nThe model is in another basis ({how}): the rotation left its logits what they were and changed its weights,"
        f" so adapters trained on the original `{name}` do not fit it.\n"
    )


def refuse_rounding(model: nn.Module, format: str, *, inputs: bool = True) -> None:
    """Raise `FormatError` where attention rounds its cache, or (`inputs`) a linear its input: `format` cannot say."""
    if (bits := cache_bits(base_of(model))) < 16:
        raise FormatError(
            f"{format} cannot say that the cache is rounded", got=f"{bits} bits", remedy="use the model folder"
        )
    modules = plain(model) if inputs else {}
    rounding = [n for n, m in modules.items() if isinstance(m, QuantLinear) and m.activations is not None]
    if rounding:
        raise FormatError(
            f"{format} cannot say that inputs are rounded",
            got=f"{rounding[0]} and {len(rounding) - 1} more" if len(rounding) > 1 else rounding[0],
            remedy="export compressed-tensors, or use the model folder",
        )


def own_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The parameters and persistent buffers of `module` itself, without its children's; floats in `dtype` if given."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            tensors[name] = buffer
    return {k: t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype) for k, t in tensors.items()}


def packed_state(
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype,
    packed: Callable[[QuantLinear, torch.dtype], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The state dict of a model given as its modules by name: `packed` writes its `QuantLinear`s, everything else is in
    `dtype`."""
    state: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors = own_state(module, dtype)
        if isinstance(module, QuantLinear):
            tensors = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in module.names}
            tensors |= packed(module, dtype)
        state.update({f"{name}.{leaf}" if name else leaf: tensor for leaf, tensor in tensors.items()})
    return state


def write_folder(
    model: nn.Module,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: Any = None,
    shard: str = "5GB",
) -> None:
    """Write config and `state`, without what `model` ties, as a Hugging Face folder: the one way slimtune writes
    models.

    `config.json` says `dtype`, and `quantization` as its `quantization_config` (none by default); a rotated model's
    folder has its rotation. `model` lends
    transformers' writer its class and its config, and is afterwards as it was: an adapter on it is not written.
    """
    base = cast(PreTrainedModel, base_of(model))
    config = base.config
    # With its quantizer in place, transformers would write the tensors in memory, adapter and all, instead of `state`.
    flags: tuple[str, ...] = ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions")
    facts = {key: base.__dict__.pop(key) for key in flags if key in base.__dict__}
    if facts.get("_weight_conversions") is not None:  # names on disk; but how others packed weights is not undone
        base.__dict__["_weight_conversions"] = [c for c in facts["_weight_conversions"] if _has_reverse(c)]
    base.config = deepcopy(config)
    base.config.__dict__.pop("quantization_config", None)
    if quantization is not None:
        base.config.quantization_config = quantization
    try:
        untied = {name: tensor for name, tensor in state.items() if name not in base.all_tied_weights_keys}
        base.config = stock_config(base.config)
        base.save_pretrained(folder, state_dict=untied, max_shard_size=shard)
        base.config.dtype = dtype  # save_pretrained wrote the dtype of the model in memory
        if base.config.model_type != config.model_type:  # and the class of the model in memory
            base.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.config.model_type]]
        base.config.save_pretrained(folder)
    finally:
        base.config = config
        base.__dict__.update(facts)
    basis = rotation_of(base)
    if basis is not None:
        write_rotation(basis, folder)


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration under which stock transformers loads what `config` describes.

    It is `config` itself, but for a pruned model whose heads no longer divide its hidden size where its family wants
    that (Llama): then the same model in the words of a family that computes the same (Mistral, without a window).
    """
    if "text_config" in vars(config):
        config.text_config = stock_config(config.text_config)
        return config
    widths = family_of(config.model_type).widths
    if not widths.divides or config.hidden_size % getattr(config, widths.heads) == 0:
        return config
    if not widths.stand_in:
        raise FormatError(
            "transformers refuses this number of heads in this family",
            got=f"{getattr(config, widths.heads)} heads, hidden size {config.hidden_size}",
            wanted="heads that divide the hidden size",
        )
    other = AutoConfig.for_model(widths.stand_in)
    facts = {key: value for key, value in vars(config).items() if key in vars(other) and key != "architectures"}
    made = AutoConfig.for_model(widths.stand_in, **{**facts, "sliding_window": None})
    for key in ("quantization_config", "_name_or_path", KEY):
        if key in vars(config):
            setattr(made, key, vars(config)[key])
    return made


def _has_reverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:  # reason: it is how transformers says that an operation has no reverse
        return False
    return True


PROBE = tuple(range(3, 3 + 48))
"""Token ids of the short input whose logits are compared."""


@torch.no_grad()
def probe_logits(model: nn.Module) -> torch.Tensor:
    """Float32 logits of `model` on the probe (`PROBE`, modulo the vocabulary)."""
    model.eval()
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    tokens = torch.tensor([[token % vocabulary for token in PROBE]])
    with reference():  # readers multiply floats; near a tie, inputs are rounded elsewhere after any other sum
        logits: torch.Tensor = model(**model_inputs(model, tokens)).logits
    return logits.float()


def largest_difference(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype | None, where: str) -> float:
    """`max |got - wanted|`. Raises `FormatError` when it is no number, or exceeds what rounding to `dtype` (None:
    anything) explains."""
    difference = float((got - wanted).abs().max())
    if dtype is None and math.isfinite(difference):
        return difference
    dtype = dtype or torch.float32
    tolerance = 2 * torch.finfo(dtype).eps ** 0.5 * max(float(wanted.abs().max()), 1.0)
    if not difference <= tolerance:
        raise FormatError(
            "the export does not compute what the model computes",
            where=where,
            got=f"logits differ by {difference:g}",
            wanted=f"at most {tolerance:g}",
        )
    return difference
