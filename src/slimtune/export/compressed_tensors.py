"""Packed weights in the format of compressed-tensors, `pack-quantized`: the one that vLLM and transformers both load.

slimtune's codes are that format's bitstream already (compressed-tensors >= 0.17): `weight_packed` is the stored tensor
seen as int32, and zero points are packed the same way along `out_features`. What the format cannot say is refused,
layer by layer, before anything is written.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn

from slimtune.errors import BackendMissing, FormatError, RecipeError
from slimtune.export.base import Source, packed_state, probe_logits, write_folder
from slimtune.export.foreign import exact
from slimtune.export.load import read_model
from slimtune.linalg.packing import pack, words
from slimtune.lora.attach import has_adapter, load_adapter, plain, save_adapter
from slimtune.quant.layouts import Affine, Layout
from slimtune.quant.linear import QuantLinear

PACKAGE, OLDEST = "compressed-tensors", "0.17"
ADAPTER = "adapter"
REMEDY = (
    "export safetensors, or quantize with a method of whole zero points (rtn, optq) and a group_size of 32, 64 or -1 "
    "that divides the width"
)

Scheme = tuple[int, int, bool]
"""Bits, group size (-1: a whole row), and whether the grid is symmetric: what the layers of a config group share."""


class CompressedTensorsExporter:
    """A Hugging Face folder whose quantized linears stay packed; an adapter lies beside them in `adapter/`."""

    loads_in: ClassVar[str] = (
        "A packed Hugging Face model in the compressed-tensors format `pack-quantized`, made from `{name}`.\n\n"
        "- transformers: `pip install 'compressed-tensors>=0.17'`, then `AutoModelForCausalLM.from_pretrained(FOLDER)`;"
        " 2, 3, 4 and 8 bits; the weights are decoded in memory\n"
        "- vLLM: the folder is the model; 4 and 8 bits, and 2 and 3 bits in new versions where the grid is symmetric\n"
        "- `adapter/`, where there is one, is a stock PEFT adapter trained on these packed weights and not merged into"
        " them; load it on this model:\n"
        "  - transformers + PEFT: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER),"
        " 'FOLDER/adapter')` (run the model once before where its layers differ in bits)\n"
        "  - vLLM: `vllm serve FOLDER --enable-lora --lora-modules mine=FOLDER/adapter`\n"
    )

    def write(self, source: Source, folder: Path) -> None:
        """Write packed weights, everything else in `source.dtype`, and the adapter; `source.model` is not changed."""
        require_reader()
        modules = plain(source.model)
        schemes = schemes_of({name: module for name, module in modules.items() if isinstance(module, QuantLinear)})
        dense = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        write_folder(
            source.model,
            packed_state(modules, source.dtype, packed_layer),
            folder,
            dtype=source.dtype,
            quantization=quantization_config(schemes, dense),
        )
        source.tokenizer.save_pretrained(folder)
        if has_adapter(source.model):
            (folder / ADAPTER).mkdir()
            save_adapter(cast(PeftModel, source.model), folder / ADAPTER)

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
    faults = [f"{name}: {fault}" for name, layer in layers.items() if (fault := fault_of(layer.layout))]
    if faults:
        raise FormatError("compressed-tensors cannot hold these layers", got="\n          ".join(faults), remedy=REMEDY)
    layouts = {name: cast(Affine, layer.layout) for name, layer in layers.items()}
    grouped = {_scheme(layout) for layout in layouts.values() if layout.groups > 1}
    schemes: dict[Scheme, list[str]] = {}
    for name, layout in layouts.items():
        scheme = _scheme(layout)
        # A row of one group is a group as well: where others have groups of this size, there is one scheme, not two.
        alone = layout.groups == 1 and scheme not in grouped
        schemes.setdefault((layout.bits, -1, layout.symmetric) if alone else scheme, []).append(name)
    if len(schemes) > 1 and not all(symmetric for _, _, symmetric in schemes):
        raise FormatError(
            "transformers reads compressed-tensors with zero points only where all layers share bits and group size",
            got="\n          ".join(f"{_spoken(scheme)}: {', '.join(names)}" for scheme, names in schemes.items()),
            remedy="quantize with sym: true, or with the same bits and group_size everywhere, or export safetensors",
        )
    return schemes


def quantization_config(schemes: dict[Scheme, list[str]], dense: list[str]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`; `dense` are the linears that were left as they are."""
    groups = {}
    for number, ((bits, group_size, symmetric), names) in enumerate(schemes.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,  # the form every engine knows, where it will do
            "weights": {
                "num_bits": bits,
                "type": "int",
                "strategy": "channel" if group_size == -1 else "group",
                "group_size": None if group_size == -1 else group_size,
                "symmetric": symmetric,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": PACKAGE,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        # transformers (5.23) decodes while it loads, with the first group's scheme for all; or afterwards, but then not
        # with zero points, and not T5. Other engines ignore the key.
        "dequantize": len(schemes) == 1,
    }


def packed_layer(layer: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an affine layer as compressed-tensors names and packs them.

    Its codes and zero points are signed and are packed with `2**(bits - 1)` added: that is what ours are. Scales are in
    `dtype`, because readers decode in the dtype of the scales: in bfloat16 they would round a float32 model's weights.
    """
    layout, tensors = cast(Affine, layer.layout), layer.qtensor.tensors
    scale = tensors["scale"]
    packed = {
        "weight_packed": words(tensors["codes"]),
        "weight_scale": scale.to(dtype) if exact(scale, dtype) else scale,
        "weight_shape": torch.tensor([layout.out_features, layout.in_features]),
    }
    if not layout.symmetric:
        packed["weight_zero_point"] = words(pack(tensors["zero"].T, layout.bits)).T.contiguous()
    return packed


def fault_of(layout: Layout) -> str:
    """Why compressed-tensors cannot hold weights of this layout; empty where it can."""
    if not isinstance(layout, Affine):
        return f"its layout is '{layout.tag}', not affine"
    if layout.float_zero:
        return "its zero points are not whole numbers"
    if layout.in_features % layout.group_size:
        return f"groups of {layout.group_size} do not divide {layout.in_features} input features"
    return ""


def _scheme(layout: Affine) -> Scheme:
    return layout.bits, layout.group_size, layout.symmetric


def _spoken(scheme: Scheme) -> str:
    bits, group_size, symmetric = scheme
    return f"{bits} bits, group_size {group_size}, {'symmetric' if symmetric else 'zero points'}"
