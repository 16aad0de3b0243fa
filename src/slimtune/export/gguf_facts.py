"""What llama.cpp calls a model: its architecture, its numbers, and where each tensor goes.

A model that llama.cpp would compute differently is refused here, with the reason: its files say less than a
configuration of transformers does, and what they do not say is built into llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import gguf
import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.arch.spec import attention_heads, head_width, key_value_heads
from slimtune.errors import FormatError, UnknownArchitecture
from slimtune.export.gguf_widths import Widths
from slimtune.lora.attach import base_of

ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp: its name, the activation it computes, whether it turns neighbouring numbers of a
    head (`pairs`; transformers turns its halves), whether its heads must make up the width of the model (`filled`),
    where it knows sliding windows, after how many blocks one sees everything (`every`), and which tensors may have a
    `bias`."""

    name: str
    activation: str = "silu"
    pairs: bool = False
    filled: bool = False
    every: int = 0
    biased: tuple[str, ...] = ()


QKV = ("attn_q", "attn_k", "attn_v")
LLAMA = Architecture("llama", pairs=True, biased=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", filled=True, biased=QKV),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3", filled=True),
    "gemma2": Architecture("gemma2", "gelu_pytorch_tanh", every=2),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", every=6),
}
"""llama.cpp's architecture for each `model_type`."""


@dataclass(frozen=True)
class Naming:
    """How a model's tensors are called and stored in GGUF; with `widths`, without what those leave out. Raises
    `UnknownArchitecture` where llama.cpp has none."""

    model: nn.Module
    widths: Widths | None = None

    @cached_property
    def config(self) -> Any:
        """The configuration of the model without its adapter."""
        return cast(Any, base_of(self.model)).config

    @cached_property
    def architecture(self) -> Architecture:
        """llama.cpp's architecture."""
        kind = str(self.config.model_type)
        if kind not in ARCHITECTURES:
            raise UnknownArchitecture("GGUF export does not know this kind of model", got=kind, wanted=[*ARCHITECTURES])
        found = ARCHITECTURES[kind]
        if self.widths is None:
            return found
        if found.name != "llama":
            raise UnknownArchitecture(
                "llama.cpp wants all blocks of this kind of model alike",
                got=kind,
                wanted=[kind for kind, known in ARCHITECTURES.items() if known.name == "llama"],
                remedy="export gguf, zeros included",
            )
        return replace(found, name="deci")

    def require_computed(self) -> None:
        """Raise `FormatError`, naming everything that llama.cpp would compute differently."""
        config, architecture = self.config, self.architecture
        rope, width = _rope(config), head_width(config)
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        faults = []
        if activation != architecture.activation:
            faults.append(f"activation {activation}, where it computes {architecture.activation}")
        known = ("default", "linear", *(["llama3"] if architecture.pairs else []))
        if rope["rope_type"] not in known:
            faults.append(f"rotary embeddings of type {rope['rope_type']}")
        if architecture.every:
            faults += _gemma_faults(config, architecture, width)
        if architecture.filled and width * attention_heads(config) != config.hidden_size:
            faults.append(f"heads of {width} that do not make up the width {config.hidden_size}")
        names = (f"{port.name}.bias" for port in bind(self.model).linears if port.bias)
        biased = [name for name in names if self.name(name).split(".")[-2] not in architecture.biased]
        if biased:
            faults.append(f"a bias that it does not add: {biased[0]}{' and others' if biased[1:] else ''}")
        if faults:
            raise FormatError(
                f"llama.cpp's {architecture.name} would compute something else",
                got="; ".join(faults),
                remedy="export safetensors",
            )

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(numbers[self.architecture.name], self.config.num_hidden_layers)

    @cached_property
    def _plus_one(self) -> frozenset[str]:
        """Gains that transformers adds one to, and llama.cpp does not."""
        return frozenset(f"{norm.name}.weight" for norm in bind(self.model).norms if norm.kind == "rms_plus_one")

    def holds(self, tensor: str) -> bool:
        """Whether the file has a tensor for the model's `tensor`: not where its whole sub-layer is left out."""
        return self.widths is None or not self.name(tensor).startswith(self.widths.missing)

    def name(self, tensor: str) -> str:
        """llama.cpp's name for a tensor of the model. Raises `FormatError` where there is none."""
        name = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None or tensor in cast(Any, base_of(self.model)).all_tied_weights_keys:
            raise FormatError(f"llama.cpp's {self.architecture.name} has no such tensor", got=tensor)
        return name

    def order(self, tensor: str, rows: int) -> Tensor | None:
        """Which rows of the model's `tensor` the file has, in its order; None where it has all as they are.

        A rotary embedding turns number `i` of a head together with number `i + width / 2`, and in llama.cpp's `llama`
        with its neighbour.
        """
        kept = self._kept(tensor, 0, rows)
        if not self.architecture.pairs or self.name(tensor).split(".")[-2] not in ("attn_q", "attn_k"):
            return kept
        count = rows if kept is None else len(kept)
        paired = torch.arange(count).view(count // head_width(self.config), 2, -1).transpose(1, 2).flatten()
        return paired if kept is None else kept[paired]

    def _kept(self, tensor: str, dim: int, size: int) -> Tensor | None:
        return None if self.widths is None else self.widths.kept(tensor, dim, size)

    def cuts_columns(self, tensor: str, columns: int) -> bool:
        """Whether the file has not all columns of the model's `tensor`."""
        return self._kept(tensor, 1, columns) is not None

    def stored(self, tensor: str, value: Tensor) -> Tensor:
        """The tensor of the model called `tensor` as llama.cpp wants it."""
        value = value + 1 if tensor in self._plus_one else value
        order, columns = self.order(tensor, len(value)), self._kept(tensor, 1, value.shape[-1])
        value = value if columns is None else value[:, columns]
        return value if order is None else value[order]

    def restored(self, tensor: str, value: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `stored`, for a tensor of `shape`; zeros where something was left out."""
        value = value - 1 if tensor in self._plus_one else value
        for dim, kept in ((0, self.order(tensor, shape[0])), (1, self._kept(tensor, 1, shape[-1]))):
            if kept is not None:
                size = (*value.shape[:dim], shape[dim], *value.shape[dim + 1 :])
                value = value.new_zeros(size).index_copy_(dim, kept, value)
        return value


def add_facts(writer: GGUFWriter, naming: Naming) -> None:
    """Give `writer` the numbers of the model. Raises `FormatError` where llama.cpp computes something else."""
    config, architecture = naming.config, naming.architecture
    naming.require_computed()
    width = head_width(config)
    context, window = int(config.max_position_embeddings), _window(config)
    writer.add_vocab_size(config.vocab_size)
    # Where llama.cpp knows no window, what a window sees is right as long as the text is no longer than that.
    writer.add_context_length(context if architecture.every or not window else min(context, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    own = naming.widths
    writer.add_feed_forward_length(config.intermediate_size if own is None else own.ffn)
    writer.add_head_count(attention_heads(config) if own is None else own.heads)
    writer.add_head_count_kv(key_value_heads(config) if own is None else own.kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if architecture.every:
        writer.add_sliding_window(window)
        local = config.rope_parameters.get("sliding_attention", rope)
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (value := getattr(config, cap, None)) is not None:
            writer.add_float32(f"{architecture.name}.{cap}", float(value))
    if architecture.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(int(config.original_max_position_embeddings))


def rope_frequencies(config: Any) -> Tensor | None:
    """What Llama 3.1 divides each frequency by (llama.cpp: `rope_freqs`), float32 `[width / 2]`; None for others."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = head_width(config)
    frequency = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = frequency * rope["original_max_position_embeddings"] / (2 * math.pi)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _rope(config: Any) -> Mapping[str, Any]:
    """The rotary embedding of the blocks that see everything."""
    facts = config.rope_parameters
    return cast(Mapping[str, Any], facts.get("full_attention", facts))


def _window(config: Any) -> int:
    """The sliding window, 0 where no block has one."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return int(getattr(config, "sliding_window", None) or 0) if slides else 0


def _gemma_faults(config: Any, architecture: Architecture, width: int) -> list[str]:
    faults, blocks = [], int(config.num_hidden_layers)
    pattern = [
        "full_attention" if (block + 1) % architecture.every == 0 else "sliding_attention" for block in range(blocks)
    ]
    if list(config.layer_types) != pattern:
        faults.append(f"blocks that see everything, other than every {architecture.every}th")
    largest = {"gemma2": 46, "gemma3": 62}[architecture.name]  # the 27B models, which scale by their width
    scale = config.hidden_size / attention_heads(config) if blocks == largest else width
    if config.query_pre_attn_scalar != scale:
        faults.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where it takes {scale:g}")
    if architecture.name == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        faults.append("logits that are not capped")
    if getattr(config, "use_bidirectional_attention", False):
        faults.append("attention that looks ahead")
    return faults
