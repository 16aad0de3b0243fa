"""Blocks of different widths in a Hugging Face folder: units that are all zeros are left out.

vLLM's `DeciLMForCausalLM` reads from `block_configs` how many key-value heads and FFN channels a block has, and whether
it has an attention and a feed-forward layer. Query heads are as many in every block: where key-value heads go, the
query heads that they served stay, with the zeros that they are read with, and are dealt out among the others.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from slimtune.arch import Space, bind
from slimtune.errors import FormatError, UnknownArchitecture
from slimtune.export.base import Source, Written, refuse_rounding
from slimtune.export.configuration_decilm import DeciLMConfig
from slimtune.export.gguf_widths import read_features, silent_units
from slimtune.export.load import read_model
from slimtune.export.modeling_decilm import DeciLMForCausalLM
from slimtune.export.safetensors import merged_state
from slimtune.lora.attach import base_of, plain
from slimtune.prune.groups import axes

KINDS = ("llama", "mistral", "qwen2")
"""Types of models that differ in nothing but widths, biases and windows."""

Stay = dict[str, dict[int, Tensor]]
"""Indices that stay, in their new order, by port and dimension (0 what it writes, 1 what it reads)."""


class DecilmExporter:
    """A Hugging Face folder without the zeros that stand for pruned units, and the code that reads it."""

    loads_in: ClassVar[str] = (
        "A dense Hugging Face model (a merge of `{name}` and what was trained on it). Its blocks have as many key-value"
        " heads and FFN channels as pruning left each (`block_configs` in `config.json`), which no stock configuration"
        " of transformers can say. So two files of code lie in the folder, `configuration_decilm.py` and"
        " `modeling_decilm.py`: read them before you let them run. An adapter of the run does not fit.\n\n"
        "- vLLM (0.24 or newer): `vllm serve FOLDER --trust-remote-code`; it runs the configuration's file, and a model"
        " of its own. `--tensor-parallel-size` must divide the heads and channels of every block\n"
        "- transformers (5.23 or newer): `AutoModelForCausalLM.from_pretrained` with `trust_remote_code` runs both\n"
        "- not SGLang, TensorRT-LLM, nor slimtune: export `safetensors`, zeros included, which has no code\n"
        "- llama.cpp: export `gguf-deci`\n"
    )

    def write(self, source: Source, folder: Path) -> Written:
        """Write merged weights in `source.dtype`; `source.model` is not changed."""
        refuse_rounding(source.model, "decilm")
        config, stay = described(source.model)
        with init_empty_weights(include_buffers=False):
            made: Any = DeciLMForCausalLM(config)
        made.to(source.dtype).generation_config = deepcopy(cast(Any, base_of(source.model)).generation_config)
        whole, tied = merged_state(source.model, source.dtype), made.all_tied_weights_keys
        state = {name: _cut(name, whole[name], stay) for name in made.state_dict() if name not in tied}
        made.save_pretrained(folder, state_dict=state, max_shard_size="5GB")  # and the code of its classes
        source.tokenizer.save_pretrained(folder)
        blocks = [(block.attention, block.ffn) for block in config.block_configs]
        heads = [0 if a.no_op else config.num_attention_heads // a.n_heads_in_group for a, _ in blocks]
        return Written({"kv_heads": heads, "ffn": [ffn.intermediate_size or 0 for _, ffn in blocks]}, source.dtype)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model that transformers loads with the folder's code, which is this package's own."""
        return read_model(folder, source.dtype, DeciLMForCausalLM)

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


def described(model: nn.Module) -> tuple[DeciLMConfig, Stay]:
    """The configuration of `model` (its adapter merged in thought) with the widths that its blocks need to compute what
    it computes, and what stays of its tensors. Raises what `require_described` does."""
    require_described(model)
    base, modelmap, modules = base_of(model), bind(model), plain(model)
    blocks: list[dict[str, Any]] = [{} for _ in modelmap.blocks]
    stay, facts = Stay(), dict[str, Any]()
    for axis in axes(modelmap, ("kv", "ffn")):
        bias = modelmap[axis.name].bias  # which is added whatever is read
        silent = silent_units(read_features(base.get_submodule(axis.name), modules[axis.name]), axis)
        units, heads = [unit for unit in range(axis.units) if unit not in silent], list[int]()
        if axis.kind == "ffn":
            name, size, units = "ffn", "intermediate_size", units or [0] * bias
            number, facts["mlp_bias"] = len(units), bias
        else:
            # vLLM's first block takes what it adds to from its attention.
            units, heads = _dealt(modelmap.heads, modelmap.kv_heads, units, int(bias or axis.blocks == (0,)))
            name, size, number = "attention", "n_heads_in_group", modelmap.heads // max(len(units), 1)
            facts |= {"attention_bias": bias, "qkv_bias": modelmap[axis.parts[0].port].bias}
        words = {"no_op": not units, "replace_with_linear": False, size: number if units else None}
        blocks[axis.blocks[0]][name] = words
        for part in axis.parts if units else ():
            served = heads and modelmap[part.port].writes != (Space.KV_HEAD,)
            order = replace(part, size=modelmap.head_dim).indices(heads) if served else part.indices(units)
            stay.setdefault(part.port, {})[part.dim] = torch.tensor(order)
    config = cast(Any, base).config
    known = {key for key in vars(DeciLMConfig()) if not key.startswith("_")} - {"architectures"}
    facts |= {"block_configs": blocks, "sliding_window": getattr(config, "sliding_window", None)}
    return DeciLMConfig(**{k: v for k, v in deepcopy(vars(config)).items() if k in known} | facts), stay


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


def _cut(name: str, tensor: Tensor, stay: Stay) -> Tensor:
    """What stays of the tensor called `name`."""
    port, _, leaf = name.rpartition(".")
    for dim, indices in stay.get(port, {}).items():
        if dim == 0 or leaf == "weight":
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor
