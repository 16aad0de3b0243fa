"""Packed weights in the formats of compressed-tensors that vLLM and transformers both load.

`pack-quantized` has slimtune's codes as they are (compressed-tensors >= 0.17): `weight_packed` is the stored tensor
seen as int32, and zero points are packed the same way along `out_features`. Layers of 8 bits that round their inputs to
8 bits are `int-quantized`, one code a byte, since engines look for W8A8 there, and float8 ones `float-quantized`; all
others are packed, and say so: left to itself, compressed-tensors would store W4A4 as bytes, which vLLM does not take.
What the formats cannot say is refused, layer by layer, before anything is written.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn

from slimtune.errors import BackendMissing, FormatError, RecipeError
from slimtune.export.base import Source, Written, packed_state, probe_logits, refuse_rounding, write_folder
from slimtune.export.load import read_model
from slimtune.export.packed import exact
from slimtune.export.peft import served, write_even
from slimtune.linalg.packing import pack, unpack, words
from slimtune.lora.attach import has_adapter, load_adapter, plain
from slimtune.quant.activation import Activations
from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.linear import QuantLinear

PACKAGE, OLDEST = "compressed-tensors", "0.17"
ADAPTER = "adapter"
Held = Affine | Codebook
REMEDY = (
    "export safetensors, or quantize with fp8 or a method of whole zero points (rtn, optq), and a group_size of 32, 64 "
    "or -1 that divides the width"
)


class Scheme(NamedTuple):
    """What the layers of a config group share; `group_size` -1 is a whole row, `type` one of `Activations`, and
    `inputs` are without the range, where that is static."""

    bits: int
    group_size: int
    symmetric: bool
    inputs: Activations | None
    type: str = "int"


class CompressedTensorsExporter:
    """A Hugging Face folder whose quantized linears stay packed; an adapter lies beside them in `adapter/`."""

    loads_in: ClassVar[str] = (
        "A packed Hugging Face model in a compressed-tensors format, made from `{name}`. `config.json` says which:"
        " `pack-quantized`, `int-quantized` (W8A8), `float-quantized` (FP8), or several (`mixed-precision`).\n\n"
        "- transformers: `pip install 'compressed-tensors>=0.17'`, then `AutoModelForCausalLM.from_pretrained(FOLDER)`;"
        " 2 to 6 and 8 bits; the weights are decoded in memory, and where inputs are rounded, they are rounded floats\n"
        "- vLLM: the folder is the model; 4 and 8 bits, and 2 and 3 bits in new versions where the grid is symmetric;"
        " W8A8 in integer kernels, W4A8 and W4A4 in versions that have kernels for them (mid-2026 and later),"
        " inputs of other widths in none; FP8 with one scale a row\n"
        "- `adapter/`, where there is one, is a stock PEFT adapter trained on these packed weights and not merged into"
        " them; load it on this model:\n"
        "  - transformers + PEFT: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER),"
        " 'FOLDER/adapter')` (run the model once before where its layers differ in bits)\n"
        "  - vLLM: `vllm serve FOLDER --enable-lora --lora-modules mine=FOLDER/adapter`\n"
    )

    def write(self, source: Source, folder: Path) -> Written:
        """Write packed weights, everything else in `source.dtype`, and the adapter; `source.model` is not changed."""
        require_reader()
        refuse_rounding(source.model, PACKAGE, inputs=False)
        modules = plain(source.model)
        schemes = schemes_of({name: module for name, module in modules.items() if isinstance(module, QuantLinear)})
        dense = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        transforms, tensors = self.transforms(source.model)
        write_folder(
            source.model,
            packed_state(modules, source.dtype, packed_layer) | tensors,
            folder,
            dtype=source.dtype,
            quantization=quantization_config(schemes, dense) | transforms,
        )
        source.tokenizer.save_pretrained(folder)
        if not has_adapter(source.model):
            return Written(dtype=source.dtype)
        (folder / ADAPTER).mkdir()
        rank = write_even(cast(PeftModel, source.model), folder / ADAPTER)
        return Written(dtype=source.dtype, note=served(rank, "the adapter's"))

    def transforms(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What an engine has to do online: more of the configuration, and tensors. Here: nothing."""
        return {}, {}

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model that plain transformers, and PEFT where there is an adapter, load."""
        model = read_model(folder, source.dtype)
        if not (folder / ADAPTER).is_dir():
            return model
        probe_logits(model)  # several schemes are decoded by the first forward pass only, and PEFT wants weights
        return load_adapter(model, folder / ADAPTER)

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""


def require_reader() -> None:
    """Raise `BackendMissing` unless compressed-tensors, with which every export is read back, is installed."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found or Version(found) < Version(OLDEST):
        raise BackendMissing(
            "a compressed-tensors export is read back with the package of that name",
            got=found or "not installed",
            wanted=f"{PACKAGE} >= {OLDEST}",
            remedy='pip install "slimtune[compressed]"',
        )


def schemes_of(layers: dict[str, QuantLinear]) -> dict[Scheme, list[str]]:
    """The names of `layers` by what they share.

    Raises `RecipeError` when there are none, `FormatError` naming every layer that the format, or transformers' reader
    of it, cannot take.
    """
    if not layers:
        raise RecipeError(
            "there are no packed weights to export", remedy="put a quantize step before, or export safetensors"
        )
    faults = [
        f"{name}: {fault}"
        for name, layer in layers.items()
        if (fault := fault_of(layer.layout) or fault_of_rounding(layer.activations))
    ]
    if faults:
        raise FormatError("compressed-tensors cannot hold these layers", got="\n          ".join(faults), remedy=REMEDY)
    found = {name: _scheme(layer) for name, layer in layers.items()}
    grouped = {found[name] for name, layer in layers.items() if cast(Held, layer.layout).groups > 1}
    schemes: dict[Scheme, list[str]] = {}
    for name, scheme in found.items():
        # A row of one group is a group as well: where others have groups of this size, there is one scheme, not two.
        alone = cast(Held, layers[name].layout).groups == 1 and scheme not in grouped
        schemes.setdefault(scheme._replace(group_size=-1) if alone else scheme, []).append(name)
    if _read_late(schemes) and not all(scheme.symmetric for scheme in schemes):
        raise FormatError(
            "transformers reads compressed-tensors with zero points only where all layers share bits and group size, "
            "and none rounds its input",
            got="\n          ".join(f"{_spoken(scheme)}: {_few(names)}" for scheme, names in schemes.items()),
            remedy="quantize with sym: true, or "
            + (
                "keep the model folder"
                if any(scheme.inputs for scheme in schemes)
                else "with the same bits and group_size everywhere, or export safetensors"
            ),
        )
    return schemes


def _read_late(schemes: Mapping[Scheme, object]) -> bool:
    """Whether transformers has to decode these after it has loaded them."""
    return len(schemes) > 1 or any(scheme.inputs for scheme in schemes)


def quantization_config(schemes: dict[Scheme, list[str]], dense: list[str]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`; `dense` are the linears that were left as they are."""
    groups: dict[str, dict[str, Any]] = {}
    for number, (scheme, names) in enumerate(schemes.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,  # the form every engine knows, where it will do
            "weights": {
                "num_bits": scheme.bits,
                "type": scheme.type,
                "strategy": "channel" if scheme.group_size == -1 else "group",
                "group_size": None if scheme.group_size == -1 else scheme.group_size,
                "symmetric": scheme.symmetric,
                "dynamic": False,
            },
            "input_activations": _input_activations(scheme.inputs) if scheme.inputs else None,
            "output_activations": None,
            "format": format_of(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": PACKAGE,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        # transformers (5.23) decodes while it loads, with the first group's scheme for all and inputs left alone; or
        # afterwards, but then not with zero points, and not T5. Other engines ignore the key.
        "dequantize": not _read_late(schemes),
    }


def _input_activations(inputs: Activations) -> dict[str, Any]:
    how = {"strategy": "tensor" if inputs.static else "token", "dynamic": not inputs.static}
    return {"num_bits": inputs.bits, "type": inputs.type, "symmetric": inputs.sym, **how}


def packed_layer(layer: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an affine or float8 layer as compressed-tensors names and packs them.

    `int-quantized` has signed codes, one a byte, and `float-quantized` float8 numbers.

    Packed ones and zero points are signed and are packed with `2**(bits - 1)` added: that is what ours are. Scales
    are in `dtype`, because readers decode in the dtype of the scales: in bfloat16 they would round a float32
    model's weights.
    """
    layout, tensors = cast(Held, layer.layout), layer.qtensor.tensors
    shared = {"weight_scale": _in(dtype, tensors["scale"])}
    if layer.activations is not None and layer.activations.static:
        shared |= _input_range(layer.activations, dtype)
    if isinstance(layout, Codebook):
        codes = unpack(tensors["codes"], layout.bits, layout.in_features)
        return {"weight": codes.view(torch.float8_e4m3fn).clone(), **shared}
    if format_of(_scheme(layer)) == "int-quantized":
        codes = unpack(tensors["codes"], layout.bits, layout.in_features).to(torch.int16) - 128
        return {"weight": codes.to(torch.int8), **shared}
    packed = {
        "weight_packed": words(tensors["codes"]),
        **shared,
        "weight_shape": torch.tensor([layout.out_features, layout.in_features]),
    }
    if not layout.symmetric:
        packed["weight_zero_point"] = words(pack(tensors["zero"].T, layout.bits)).T.contiguous()
    return packed


def _input_range(inputs: Activations, dtype: torch.dtype) -> dict[str, Tensor]:
    """The scale of a static range, and its zero point where it has one: clip ratios are in them."""
    scale, zero = inputs.grid(torch.zeros(1), torch.zeros(1))
    point = {} if inputs.sym else {"input_zero_point": (zero - 2 ** (inputs.bits - 1)).to(torch.int8)}
    return {"input_scale": _in(dtype, scale), **point}


def _in(dtype: torch.dtype, scale: Tensor) -> Tensor:
    return scale.to(dtype) if exact(scale, dtype) else scale


def fault_of(layout: Layout) -> str:
    """Why compressed-tensors cannot hold weights of this layout; empty where it can."""
    if not isinstance(layout, Affine) and not (isinstance(layout, Codebook) and layout.is_float8):
        return f"its layout is '{layout.tag}', neither affine nor float8"
    if isinstance(layout, Affine) and layout.float_zero:
        return "its zero points are not whole numbers"
    if layout.in_features % layout.group_size:
        return f"groups of {layout.group_size} do not divide {layout.in_features} input features"
    return ""


def fault_of_rounding(activations: Activations | None) -> str:
    """Why compressed-tensors cannot say that inputs are rounded so; empty where it can."""
    if activations is None or activations.bits == 16:
        return ""
    faults = []
    if activations.group_size != -1:
        faults.append(f"in groups of {activations.group_size}")
    if not activations.static and (activations.search or activations.clip_ratio != 1):
        faults.append("on a part of a token's range (clip_ratio, search)")
    return f"its inputs are rounded {' and '.join(faults)}" if faults else ""


def format_of(scheme: Scheme) -> str:
    """The format of layers of this scheme."""
    if scheme.type == "float":
        return "float-quantized"
    eights = scheme.bits == 8 and scheme.inputs is not None and (scheme.inputs.bits, scheme.inputs.type) == (8, "int")
    return "int-quantized" if eights and scheme.group_size == -1 and scheme.symmetric else "pack-quantized"


def _scheme(layer: QuantLinear) -> Scheme:
    layout, found = cast(Held, layer.layout), layer.activations
    rounds = found is not None and found.bits < 16
    inputs = Activations(found.bits, found.type, found.sym, static=found.static) if found and rounds else None
    size = -1 if layout.groups == 1 and inputs else layout.group_size
    kind, symmetric = ("int", layout.symmetric) if isinstance(layout, Affine) else ("float", True)
    return Scheme(layout.bits, size, symmetric, inputs, kind)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _spoken(scheme: Scheme) -> str:
    rounded = f", inputs {scheme.inputs.bits} bits ({scheme.inputs.type})" if scheme.inputs else ""
    kind = "float8" if scheme.type == "float" else "symmetric" if scheme.symmetric else "zero points"
    return f"{scheme.bits} bits, group_size {scheme.group_size}, {kind}{rounded}"
