"""The configuration of a GGUF file of others: what transformers reads from it, and what it leaves out.

transformers takes a file's numbers from a list of names, and passes over a head's width, biases and scaled rotary
embeddings in silence: the model would load, and compute something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader
from transformers import AutoConfig, PretrainedConfig

from slimtune.errors import FormatError, UnknownArchitecture
from slimtune.export.ggml import decode
from slimtune.export.gguf_facts import ROPE_FREQUENCIES, rope_frequencies
from slimtune.export.gguf_file import Header, read_header

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
"""What Llama 3.1 and its kin were trained with; their files hold only what comes of it."""


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration of the model in the GGUF file `path`.

    Raises `FormatError` when it is none, is damaged, or holds an adapter, and where its rotary embedding cannot be
    said; `UnknownArchitecture` when transformers does not read its architecture.
    """
    header = read_header(path)
    kind = str(header.values.get("general.type", "model"))
    if kind != "model" or not header.tensors:
        raise FormatError("the GGUF file holds no model", where=str(path), got=kind, remedy="name a GGUF model")
    try:
        config = cast(Any, AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    except ValueError as error:
        raise UnknownArchitecture(
            "transformers does not read GGUF files of this architecture",
            where=str(path),
            got=header.architecture,
            wanted=str(error)[:200],
            remedy="use the model's safetensors folder",
        ) from error
    except (OSError, KeyError, IndexError, TypeError) as error:
        raise FormatError("the GGUF file cannot be read", where=str(path), got=str(error)[:300]) from error
    facts = {name.partition(".")[2]: value for name, value in header.values.items()}
    if "attention.key_length" in facts and "head_dim" in config.to_dict():
        config.head_dim = int(facts["attention.key_length"])
    for field, tensor in (("attention_bias", "attn_output.bias"), ("mlp_bias", "ffn_down.bias")):
        if field in config.to_dict():
            setattr(config, field, f"blk.0.{tensor}" in header.tensors)
    _set_rope_(config, facts, header, path)
    return cast(PretrainedConfig, config)


def _set_rope_(config: Any, facts: dict[str, Any], header: Header, path: Path) -> None:
    """Give `config` the scaled rotary embedding of the file."""
    scaling = facts.get("rope.scaling.type", "none")
    if scaling == "linear":
        scaled = {"rope_type": "linear", "factor": float(facts.get("rope.scaling.factor", 1.0))}
        config.rope_parameters = {**config.rope_parameters, **scaled}
    elif scaling != "none":
        raise FormatError("a rotary embedding that a GGUF file does not tell whole", where=str(path), got=scaling)
    if ROPE_FREQUENCIES not in header.tensors:
        return
    data = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FREQUENCIES)
    found = decode(data.data, data.tensor_type.name)
    told = {**LLAMA3, "factor": float(found.max()), "original_max_position_embeddings": LLAMA3_CONTEXT}
    config.rope_parameters = {**config.rope_parameters, **told}
    wanted = rope_frequencies(config)
    if wanted is None or wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-4):
        raise FormatError("rotary frequencies that are not those of Llama 3.1", where=f"{path}, {ROPE_FREQUENCIES}")
