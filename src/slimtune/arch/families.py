"""The families slimtune knows: one row of facts each, and the only place where the names of their modules stand.

`docs/adding.md` tells how to add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

from slimtune.arch.spec import (
    Config,
    FamilySpec,
    NormKind,
    NormSpec,
    PortSpec,
    Space,
    StackSpec,
    Widths,
    attention_heads,
    head_width,
    key_value_heads,
)
from slimtune.tables import Table

RESIDUAL, HEAD, KV_HEAD, HEADS, FFN = Space.RESIDUAL, Space.HEAD, Space.KV_HEAD, Space.HEADS, Space.FFN
VOCAB, WORD, POSITION, FOREIGN = Space.VOCAB, Space.WORD, Space.POSITION, Space.FOREIGN

SIZES: dict[Space, Callable[[Config], int]] = {
    RESIDUAL: attrgetter("hidden_size"),
    HEAD: lambda config: attention_heads(config) * head_width(config),
    KV_HEAD: lambda config: key_value_heads(config) * head_width(config),
    HEADS: attention_heads,
    FFN: attrgetter("intermediate_size"),
    VOCAB: attrgetter("vocab_size"),
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
TOKENS = PortSpec("embed_tokens", VOCAB, (RESIDUAL,))
LM_HEAD = PortSpec("/lm_head", RESIDUAL, (VOCAB,))
LLAMA_PORTS = (
    PortSpec("self_attn.q_proj", RESIDUAL, (HEAD,), stage=0),
    PortSpec("self_attn.k_proj", RESIDUAL, (KV_HEAD,), stage=0),
    PortSpec("self_attn.v_proj", RESIDUAL, (KV_HEAD,), stage=0, values=0),
    PortSpec("self_attn.o_proj", HEAD, (RESIDUAL,), stage=1),
    PortSpec("mlp.gate_proj", RESIDUAL, (FFN,), stage=2),
    PortSpec("mlp.up_proj", RESIDUAL, (FFN,), stage=2),
    PortSpec("mlp.down_proj", FFN, (RESIDUAL,), stage=3),
)
LLAMA_NORMS = (
    NormSpec("input_layernorm", "rms", feeds=QKV),
    NormSpec("post_attention_layernorm", "rms", feeds=GATE_UP),
)
LLAMA = FamilySpec(
    name="llama",
    model_types=("llama",),
    trunk="model",
    entry=(TOKENS,),
    stacks=(StackSpec("layers", LLAMA_PORTS, LLAMA_NORMS, gated="mlp"),),
    norms=(NormSpec("norm", "rms", feeds=("/lm_head",)),),
    exit=(LM_HEAD,),
    sizes=SIZES,
    widths=Widths(divides=True, stand_in="mistral"),
)


def _query_key_norms(kind: NormKind) -> tuple[NormSpec, ...]:
    return (
        NormSpec("self_attn.q_norm", kind, follows="self_attn.q_proj"),
        NormSpec("self_attn.k_norm", kind, follows="self_attn.k_proj"),
    )


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    widths=Widths(),
    model_types=("qwen3",),
    stacks=(StackSpec("layers", LLAMA_PORTS, (*LLAMA_NORMS, *_query_key_norms("rms")), gated="mlp"),),
)

GEMMA_NORMS = (
    NormSpec("input_layernorm", "rms_plus_one", feeds=QKV),
    NormSpec("post_attention_layernorm", "rms_plus_one", follows="self_attn.o_proj"),
    NormSpec("pre_feedforward_layernorm", "rms_plus_one", feeds=GATE_UP),
    NormSpec("post_feedforward_layernorm", "rms_plus_one", follows="mlp.down_proj"),
)
GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    widths=Widths(divides=True),
    model_types=("gemma2",),
    stacks=(StackSpec("layers", LLAMA_PORTS, GEMMA_NORMS, gated="mlp"),),
    norms=(NormSpec("norm", "rms_plus_one", feeds=("/lm_head",)),),
    scaled_embeddings=True,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    stacks=(StackSpec("layers", LLAMA_PORTS, (*GEMMA_NORMS, *_query_key_norms("rms_plus_one")), gated="mlp"),),
)

PHI3_PORTS = (
    PortSpec("self_attn.qkv_proj", RESIDUAL, (HEAD, KV_HEAD, KV_HEAD), stage=0, values=2),
    PortSpec("self_attn.o_proj", HEAD, (RESIDUAL,), stage=1),
    PortSpec("mlp.gate_up_proj", RESIDUAL, (FFN, FFN), stage=2),
    PortSpec("mlp.down_proj", FFN, (RESIDUAL,), stage=3),
)
PHI3_NORMS = (
    NormSpec("input_layernorm", "rms", feeds=("self_attn.qkv_proj",)),
    NormSpec("post_attention_layernorm", "rms", feeds=("mlp.gate_up_proj",)),
)
PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    stacks=(StackSpec("layers", PHI3_PORTS, PHI3_NORMS),),
    widths=Widths(),
)


# OPT-350m alone projects its embeddings and normalises the residual stream itself (after each addition).
def _projected(config: Config) -> bool:
    return bool(config.word_embed_proj_dim != config.hidden_size)


def _pre_norm(config: Config) -> bool:
    return bool(config.do_layer_norm_before)


def _final_norm(config: Config) -> bool:
    return _pre_norm(config) and not config._remove_final_layer_norm


OPT_PORTS = (
    PortSpec("self_attn.q_proj", RESIDUAL, (HEAD,), stage=0),
    PortSpec("self_attn.k_proj", RESIDUAL, (KV_HEAD,), stage=0),
    PortSpec("self_attn.v_proj", RESIDUAL, (KV_HEAD,), stage=0, values=0),
    PortSpec("self_attn.out_proj", HEAD, (RESIDUAL,), stage=1),
    PortSpec("fc1", RESIDUAL, (FFN,), stage=2),
    PortSpec("fc2", FFN, (RESIDUAL,), stage=3),
)
OPT_NORMS = (
    NormSpec("self_attn_layer_norm", "layer", feeds=QKV, when=_pre_norm),
    NormSpec("final_layer_norm", "layer", feeds=("fc1",), when=_pre_norm),
    NormSpec("self_attn_layer_norm", "layer", when=lambda config: not _pre_norm(config)),
    NormSpec("final_layer_norm", "layer", when=lambda config: not _pre_norm(config)),
)
OPT = FamilySpec(
    name="opt",
    model_types=("opt",),
    trunk="model.decoder",
    entry=(
        PortSpec("embed_tokens", VOCAB, (WORD,), when=_projected),
        PortSpec("project_in", WORD, (RESIDUAL,), when=_projected),
        PortSpec("embed_tokens", VOCAB, (RESIDUAL,), when=lambda config: not _projected(config)),
        PortSpec("embed_positions", POSITION, (RESIDUAL,)),
    ),
    stacks=(StackSpec("layers", OPT_PORTS, OPT_NORMS),),
    norms=(
        NormSpec("final_layer_norm", "layer", ("project_out",), when=lambda c: _final_norm(c) and _projected(c)),
        NormSpec("final_layer_norm", "layer", ("/lm_head",), when=lambda c: _final_norm(c) and not _projected(c)),
    ),
    exit=(
        PortSpec("project_out", RESIDUAL, (WORD,), when=_projected),
        PortSpec("/lm_head", WORD, (VOCAB,), when=_projected),
        PortSpec("/lm_head", RESIDUAL, (VOCAB,), when=lambda config: not _projected(config)),
    ),
    sizes=SIZES
    | {
        FFN: attrgetter("ffn_dim"),
        WORD: attrgetter("word_embed_proj_dim"),
        POSITION: lambda config: config.max_position_embeddings + 2,  # the first two rows are never used
    },
    widths=Widths(head_width="", ffn="ffn_dim"),
)


def _gated(config: Config) -> bool:
    return bool(config.is_gated_act)


def _t5_attention(path: str, stage: int, cross: bool = False) -> tuple[PortSpec, ...]:
    """Self-attention takes two stages; cross-attention three: its keys and values read what the encoder made."""
    other = stage + cross
    return (
        PortSpec(f"{path}.q", RESIDUAL, (HEAD,), stage),
        PortSpec(f"{path}.k", RESIDUAL, (KV_HEAD,), other),
        PortSpec(f"{path}.v", RESIDUAL, (KV_HEAD,), other, values=0),
        PortSpec(f"{path}.o", HEAD, (RESIDUAL,), other + 1),
    )


def _t5_ffn(path: str, stage: int) -> tuple[PortSpec, ...]:
    return (
        PortSpec(f"{path}.wi", RESIDUAL, (FFN,), stage, when=lambda config: not _gated(config)),
        PortSpec(f"{path}.wi_0", RESIDUAL, (FFN,), stage, when=_gated),
        PortSpec(f"{path}.wi_1", RESIDUAL, (FFN,), stage, when=_gated),
        PortSpec(f"{path}.wo", FFN, (RESIDUAL,), stage + 1),
    )


def _t5_norm(layer: str, *feeds: str) -> NormSpec:
    return NormSpec(f"{layer}.layer_norm", "rms", tuple(f"{layer}.{name}" for name in feeds))


SELF, CROSS, DENSE = "SelfAttention", "EncDecAttention", "DenseReluDense"
T5_SELF_NORM = _t5_norm("layer.0", f"{SELF}.q", f"{SELF}.k", f"{SELF}.v")
T5_BIAS = f"block.0.layer.0.{SELF}.relative_attention_bias"  # the first block's serves all blocks of its stack
T5 = FamilySpec(
    name="t5",
    model_types=("t5",),
    epsilon="layer_norm_epsilon",
    entry=(
        PortSpec("shared", VOCAB, (RESIDUAL,)),
        PortSpec("encoder.embed_tokens", VOCAB, (RESIDUAL,)),
        PortSpec(f"encoder.{T5_BIAS}", POSITION, (HEADS,)),
        PortSpec("decoder.embed_tokens", VOCAB, (RESIDUAL,)),
        PortSpec(f"decoder.{T5_BIAS}", POSITION, (HEADS,)),
    ),
    stacks=(
        StackSpec(
            "encoder.block",
            (*_t5_attention(f"layer.0.{SELF}", 0), *_t5_ffn(f"layer.1.{DENSE}", 2)),
            (T5_SELF_NORM, _t5_norm("layer.1", f"{DENSE}.wi*")),
        ),
        StackSpec(
            "decoder.block",
            (
                *_t5_attention(f"layer.0.{SELF}", 0),
                *_t5_attention(f"layer.1.{CROSS}", 2, cross=True),
                *_t5_ffn(f"layer.2.{DENSE}", 5),
            ),
            (T5_SELF_NORM, _t5_norm("layer.1", f"{CROSS}.q"), _t5_norm("layer.2", f"{DENSE}.wi*")),
        ),
    ),
    norms=(
        NormSpec("encoder.final_layer_norm", "rms", (f"decoder.block.*.{CROSS}.k", f"decoder.block.*.{CROSS}.v")),
        NormSpec("decoder.final_layer_norm", "rms", ("/lm_head",)),
    ),
    exit=(LM_HEAD,),
    sizes=SIZES | {FFN: attrgetter("d_ff"), POSITION: attrgetter("relative_attention_num_buckets")},
    widths=Widths("num_heads", "", "d_kv", "d_ff", ("num_layers", "num_decoder_layers")),
)

LLAVA = FamilySpec(
    name="llava",
    model_types=("llava",),
    trunk="model.language_model",
    entry=(
        PortSpec("/model.multi_modal_projector.linear_1", FOREIGN, (FOREIGN,)),
        PortSpec("/model.multi_modal_projector.linear_2", FOREIGN, (RESIDUAL,)),
    ),
    wraps="text_config",
    foreign=("/model.vision_tower",),
)

FAMILIES: Table[FamilySpec] = Table(
    "slimtune.families",
    {
        "llama": LLAMA,
        "mistral": replace(LLAMA, name="mistral", model_types=("mistral",), widths=Widths()),
        "qwen2": replace(LLAMA, name="qwen2", model_types=("qwen2",), widths=Widths()),
        "qwen3": QWEN3,
        "gemma2": GEMMA2,
        "gemma3": GEMMA3,
        "phi3": PHI3,
        "opt": OPT,
        "t5": T5,
        "llava": LLAVA,
    },
)
