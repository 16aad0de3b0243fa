"""Blocks of different widths in a Hugging Face folder: units that are all zeros are left out.

vLLM's `DeciLMForCausalLM` reads from `block_configs` how many key-value heads and FFN channels a block has, and whether
it has an attention and a feed-forward layer. Query heads are as many in every block: where key-value heads go, the
query heads that they served stay, with the zeros that they are read with, and are dealt out among the others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any, ClassVar, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import MistralConfig

from slimtune.arch import Space, bind
from slimtune.errors import FormatError, UnknownArchitecture
from slimtune.export.base import Source, Written, refuse_rounding
from slimtune.export.gguf_widths import read_features, silent_units
from slimtune.export.load import read_model
from slimtune.export.safetensors import merged_state
from slimtune.files import write_json
from slimtune.lora.attach import base_of, plain
from slimtune.prune.groups import axes

KINDS = ("llama", "mistral", "qwen2")
"""Types of models that differ in nothing but widths, biases and windows."""

CODE = ("configuration_decilm", "modeling_decilm")
"""Modules that go into the folder; the second imports the first."""

NAMES = {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "auto_map": {"AutoConfig": f"{CODE[0]}.DeciLMConfig", "AutoModelForCausalLM": f"{CODE[1]}.DeciLMForCausalLM"},
}


@dataclass(frozen=True)
class Blocks:
    """What `config` (keys of `config.json`) says of the blocks, and their `widths` in short; the indices that `stay` of
    a port, in their new order, by dimension (0 what it writes, 1 what it reads), and the modules that are `missing`."""

    config: dict[str, Any] = field(default_factory=dict)
    widths: dict[str, list[int]] = field(default_factory=dict)
    stay: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of the tensor called `name`."""
        port, _, leaf = name.rpartition(".")
        for dim, indices in self.stay.get(port, {}).items():
            if dim == 0 or leaf == "weight":
                tensor = tensor.index_select(dim, indices.to(tensor.device))
        return tensor


class DecilmExporter:
    """A Hugging Face folder without the zeros that stand for pruned units, and the code that reads it."""

    loads_in: ClassVar[str] = (
        "A dense Hugging Face model (a merge of `{name}` and what was trained on it). Its blocks have as many key-value"
        " heads and FFN channels as pruning left each (`block_configs` in `config.json`), which no stock configuration"
        " of transformers can say. So two files of code lie in the folder, `configuration_decilm.py` and"
        " `modeling_decilm.py`: read them before you let them run. An adapter of the run does not fit.\n\n"
        "- vLLM (0.24 or newer): `vllm serve FOLDER --trust-remote-code`; it runs the configuration's file, and a model"
        " of its own. `--tensor-parallel-size` must divide the heads and channels of every block\n"
        "- transformers (5.23 or newer): `from_pretrained` of `AutoModelForCausalLM` and `AutoTokenizer`, both with"
        " `trust_remote_code`, runs both files\n"
        "- not SGLang, TensorRT-LLM, nor slimtune: export `safetensors`, zeros included, which has no code\n"
        "- llama.cpp: export `gguf-deci`\n"
    )

    def write(self, source: Source, folder: Path) -> Written:
        """Write merged weights in `source.dtype`; `source.model` is not changed."""
        refuse_rounding(source.model, "decilm")
        base: Any = base_of(source.model)
        found, left_out = own_blocks(source.model), base.all_tied_weights_keys
        state = {
            name: found.kept(name, tensor)
            for name, tensor in merged_state(source.model, source.dtype).items()
            if name not in left_out and name.rpartition(".")[0] not in found.missing
        }
        save_torch_state_dict(state, folder, max_shard_size="5GB")
        known = {each.name for each in fields(MistralConfig)}
        facts = {"sliding_window": None, **{k: v for k, v in base.config.to_dict().items() if k in known}}
        dtype = str(source.dtype).removeprefix("torch.")
        write_json(folder / "config.json", {**facts, **found.config, **NAMES, "dtype": dtype})
        base.generation_config.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        for name in CODE:
            copyfile(Path(__file__).with_name(f"{name}.py.txt"), folder / f"{name}.py")
        return Written(found.widths, source.dtype)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model that transformers loads with the code in `folder`, which slimtune has just written."""
        module: Any = None
        for name in CODE:
            spec: Any = spec_from_file_location(f"{__name__}.{name}", folder / f"{name}.py")
            module = sys.modules[spec.name] = module_from_spec(spec)
            spec.loader.exec_module(module)
        rmtree(folder / "__pycache__", ignore_errors=True)
        return read_model(folder, source.dtype, module.DeciLMForCausalLM)

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""


def require_described(model: nn.Module) -> None:
    """Raise `UnknownArchitecture` where `block_configs` are not for this kind of model, `FormatError` where its readers
    would compute something else."""
    config, remedy = cast(Any, base_of(model)).config, "export safetensors, zeros included"
    if (kind := config.model_type) not in KINDS:
        raise UnknownArchitecture("decilm cannot say this kind of model", got=kind, wanted=[*KINDS], remedy=remedy)
    if config.hidden_act != "silu":
        raise FormatError("decilm knows one activation", got=config.hidden_act, wanted="silu", remedy=remedy)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise FormatError("decilm cannot say which blocks have a window", where="layer_types", remedy=remedy)


def own_blocks(model: nn.Module) -> Blocks:
    """The widths that the blocks of `model` (its adapter merged in thought) need to compute what it computes. Raises
    what `require_described` does."""
    require_described(model)
    base, modelmap, modules = base_of(model), bind(model), plain(model)
    blocks: list[dict[str, Any]] = [{} for _ in modelmap.blocks]
    found = Blocks({"block_configs": blocks}, {"kv_heads": [0] * len(blocks), "ffn": [0] * len(blocks)})
    for axis in axes(modelmap, ("kv", "ffn")):
        bias, block = modelmap[axis.name].bias, axis.blocks[0]  # the bias is added whatever is read
        silent = silent_units(read_features(base.get_submodule(axis.name), modules[axis.name]), axis)
        units, heads = [unit for unit in range(axis.units) if unit not in silent], list[int]()
        if axis.kind == "ffn":
            units = units or [0] * bias
            name, size, biases = "ffn", {"intermediate_size": len(units) or None}, {"mlp_bias": bias}
        else:
            # vLLM's first block takes what it adds to from its attention.
            units, heads = _dealt(modelmap.heads, modelmap.kv_heads, units, int(bias or block == 0))
            name, size = "attention", {"n_heads_in_group": modelmap.heads // len(units) if units else None}
            biases = {"attention_bias": bias, "qkv_bias": modelmap[axis.parts[0].port].bias}
        found.config.update(biases)
        found.widths["ffn" if axis.kind == "ffn" else "kv_heads"][block] = len(units)
        blocks[block][name] = {"no_op": not units, "replace_with_linear": False, **size}
        for part in axis.parts:
            served = heads and modelmap[part.port].writes != (Space.KV_HEAD,)
            order = replace(part, size=modelmap.head_dim).indices(heads) if served else part.indices(units)
            found.stay.setdefault(part.port, {})[part.dim] = torch.tensor(order)
        if not units:
            ports = {part.port for part in axis.parts}
            found.missing.update(ports, (norm.name for norm in modelmap.norms if ports & set(norm.feeds)))
    return found


def _dealt(heads: int, kv_heads: int, units: list[int], least: int) -> tuple[list[int], list[int]]:
    """Key-value heads, `least` or more that divide the query heads, `units` among them; and all query heads, in the
    order of those: to each what it served, and its share of the others.

    Example:
        >>> _dealt(8, 4, [2], 0), _dealt(6, 3, [0], 2)
        (([2], [4, 5, 0, 1, 2, 3, 6, 7]), ([0, 1], [0, 1, 4, 2, 3, 5]))
    """
    count = max(len(units), least)
    while count and heads % count:
        count += 1
    units = sorted(units + [unit for unit in range(kv_heads) if unit not in units][: count - len(units)])
    run, each = heads // kv_heads, heads // max(count, 1)
    rest = iter([head for head in range(heads) if head // run not in units])
    return units, [next(rest) if i >= run else unit * run + i for unit in units for i in range(each)]
