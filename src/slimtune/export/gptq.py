"""Packed weights in the format of GPTQ: the one that GPTQModel, transformers with it, and most engines load.

slimtune's codes are that format's bitstream already: `qweight` is the stored tensor, seen as int32 and transposed. What
the format cannot say is refused, layer by layer, before anything is written; what was written is read back bit for bit.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import Source, Written, packed_state, refuse_rounding, write_folder
from slimtune.export.foreign import WIDTHS, Scheme
from slimtune.export.load import load
from slimtune.export.packed import exact
from slimtune.export.peft import served, write_even
from slimtune.files import write_json
from slimtune.linalg.packing import pack, words
from slimtune.lora.attach import base_of, has_adapter, load_adapter, plain
from slimtune.quant.layouts import Affine, Layout
from slimtune.quant.linear import QuantLinear

ADAPTER = "adapter"


class GptqExporter:
    """A Hugging Face folder whose quantized linears stay packed; an adapter lies beside them in `adapter/`."""

    loads_in: ClassVar[str] = (
        "A packed Hugging Face model in the GPTQ format, made from `{name}`.\n\n"
        "- GPTQModel: `GPTQModel.load(FOLDER)`; 2, 3, 4 and 8 bits, groups of 16 or more that are powers of two,"
        " or whole rows\n"
        "- transformers: `pip install optimum gptqmodel`, then `AutoModelForCausalLM.from_pretrained(FOLDER)`\n"
        "- vLLM: the folder is the model; 4 and 8 bits where the grid is symmetric\n"
        "- these engines compute in float16 or bfloat16, whatever was trained here\n"
        "- `adapter/`, where there is one, is a stock PEFT adapter trained on these packed weights and not merged into"
        " them; load it on this model\n"
    )

    def write(self, source: Source, folder: Path) -> Written:
        """Write packed weights, everything else in `source.dtype`, and the adapter; `source.model` is not changed."""
        modules = plain(source.model)
        refuse_rounding(source.model, "gptq")
        layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
        require_expressible(layers)
        # v1 stores zero points less one. Readers disagree about what 0 less one is, and GPTQModel takes v1 with zero
        # points from nobody but itself; v2 stores them as they are. Symmetric grids are v1, which every engine reads.
        first = all(cast(Affine, layer.layout).symmetric for layer in layers.values())
        head = cast(Any, base_of(source.model)).get_output_embeddings()
        dense = [name for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head]
        quantization = quantization_config(layers, dense, "gptq" if first else "gptq_v2")
        state = packed_state(modules, source.dtype, partial(packed_layer, less_one=first))
        write_folder(source.model, state, folder, dtype=source.dtype, quantization=quantization)
        write_json(folder / "quantize_config.json", quantization)  # where AutoGPTQ and its kin look
        source.tokenizer.save_pretrained(folder)
        if not has_adapter(source.model):
            return Written(dtype=source.dtype)
        (folder / ADAPTER).mkdir()
        rank = write_even(cast(PeftModel, source.model), folder / ADAPTER)
        return Written(dtype=source.dtype, note=served(rank, "the adapter's"))

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model as slimtune reads the format. Raises `FormatError` unless every weight is bit for bit `source`'s.

        GPTQModel itself is not asked: it needs an environment of its own (`benchmarks/peers/gptq_reads_slimtune.py`).
        """
        model = load(str(folder), dtype=str(source.dtype).removeprefix("torch.")).model
        read = dict(model.named_modules())
        for name, layer in plain(source.model).items():
            if isinstance(layer, QuantLinear) and not torch.equal(_weight(read[name]), _weight(layer)):
                raise FormatError("an exported weight does not read back", where=name)
        return load_adapter(model, folder / ADAPTER) if (folder / ADAPTER).is_dir() else model

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""


def require_expressible(layers: dict[str, QuantLinear]) -> None:
    """Raise `RecipeError` when there are no layers, `FormatError` naming every one that the format cannot hold."""
    if not layers:
        raise RecipeError(
            "there are no packed weights to export", remedy="put a quantize step before, or export safetensors"
        )
    faults = [f"{name}: {fault}" for name, layer in layers.items() if (fault := _fault(layer))]
    if faults:
        raise FormatError(
            "GPTQ cannot hold these layers",
            got="\n          ".join(faults),
            remedy="export safetensors, or quantize with rtn or optq in groups of 32, 64 or -1 that divide the width",
        )


def quantization_config(layers: dict[str, QuantLinear], dense: list[str], kind: str) -> dict[str, Any]:
    """The `quantization_config` of `config.json`: the commonest scheme, and by name what differs or is `dense`."""
    schemes = {name: _scheme(cast(Affine, layer.layout)) for name, layer in layers.items()}
    common = Counter(schemes.values()).most_common(1)[0][0]
    others = {name: scheme for name, scheme in schemes.items() if scheme != common}
    dynamic = {f"+:^{re.escape(name)}$": _facts(scheme) for name, scheme in others.items()}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in dense}
    return {
        "quant_method": "gptq",
        **_facts(common),
        "desc_act": False,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": kind,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def packed_layer(layer: QuantLinear, dtype: torch.dtype, *, less_one: bool) -> dict[str, Tensor]:
    """The tensors of an affine layer as GPTQ names and packs them; zero points `less_one` in v1."""
    layout, tensors = cast(Affine, layer.layout), layer.qtensor.tensors
    zero = tensors.get("zero", torch.full_like(tensors["scale"], 2 ** (layout.bits - 1), dtype=torch.uint8))
    return {
        "qweight": words(tensors["codes"]).T.contiguous(),
        "qzeros": words(pack((zero - int(less_one)).T.contiguous(), layout.bits)),
        "scales": tensors["scale"].to(torch.float16).T.contiguous(),
        "g_idx": torch.arange(layout.in_features, dtype=torch.int32) // layout.group_size,
    }


def fault_of(layout: Layout) -> str:
    """Why GPTQ cannot hold weights of this layout; empty where it can."""
    if not isinstance(layout, Affine):
        return f"its layout is '{layout.tag}', not affine"
    if layout.float_zero:
        return "its zero points are not whole numbers"
    if layout.bits not in WIDTHS:
        return f"{layout.bits} bits"
    if layout.in_features % layout.group_size:
        return f"groups of {layout.group_size} do not divide {layout.in_features} input features"
    for features in (layout.in_features, layout.out_features):
        if features * layout.bits % 32:
            return f"{features} codes of {layout.bits} bits do not fill 32-bit words"
    return ""


def _fault(layer: QuantLinear) -> str:
    fault = fault_of(layer.layout)
    if not fault and not exact(layer.qtensor.tensors["scale"], torch.float16):
        return "it has scales that float16 cannot hold (below about 1e-5, or above 65504)"
    return fault


def _scheme(layout: Affine) -> Scheme:
    return layout.bits, -1 if layout.groups == 1 else layout.group_size, layout.symmetric


def _facts(scheme: Scheme) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), scheme, strict=True))


def _weight(module: nn.Module) -> Tensor:
    return cast(QuantLinear, module).dequantize(torch.float32)
