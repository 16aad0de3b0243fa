"""Two-layer random models of every family, and a tokenizer for them: the subjects of the tests.

Their numbers are chosen to catch mistakes: no two spaces have the same width where the family allows it, weights have a
mean that is not zero, biases are not zero, norm gains are not one.

Example:
    >>> model = pico_model("llama")
    >>> model(**pico_inputs(model)).logits.shape
    torch.Size([2, 9, 262])
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from slimtune.lora.attach import add_lora

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>")
VOCAB_SIZE = len(SPECIAL) + 256
PAD, BOS, EOS, IMAGE = (SPECIAL.index(token) for token in ("<pad>", "<s>", "</s>", "<image>"))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SHARED: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LLAMA: dict[str, Any] = {
    **SHARED,
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT: dict[str, Any] = {
    **SHARED,
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
T5: dict[str, Any] = {
    **SHARED,
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
PICO: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-biased": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3"},
    "gemma2": {**LLAMA, **GEMMA, "model_type": "gemma2"},
    "gemma3": {**LLAMA, **GEMMA, "model_type": "gemma3_text"},
    "phi3": {**LLAMA, "model_type": "phi3"},
    "opt": OPT,
    "opt-proj": {**OPT, "word_embed_proj_dim": 24},
    "opt-post": {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "t5": T5,
    "t5-gated": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "llava": {
        **SHARED,
        "model_type": "llava",
        "text_config": LLAMA,
        "vision_config": VISION,
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
}
"""Configurations by name. The first part of a name is the family; LLaVA's overrides go to its language model."""

AUTO = {"t5": AutoModelForSeq2SeqLM, "llava": AutoModelForImageTextToText}


def pico_config(family: str, **overrides: Any) -> Any:
    """The configuration of the pico model called `family`, with some of its attributes changed."""
    values = dict(PICO[family])
    if "text_config" in values:
        values["text_config"] = {**values["text_config"], **overrides}
    else:
        values.update(overrides)
    return AutoConfig.for_model(**values)


def pico_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """The random pico model called `family` (a key of `PICO`), in evaluation mode.

    The weights depend on `seed` alone: they are drawn in float32 and cast, so float64 and float32 models are equal.
    """
    config = pico_config(family, **overrides)
    model: PreTrainedModel = AUTO.get(config.model_type, AutoModelForCausalLM).from_config(config, dtype=dtype)
    randomise_(model, seed)
    return model.eval()


@torch.no_grad()
def randomise_(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices and biases with a mean that is not zero, gains around one."""
    generator = torch.Generator().manual_seed(seed)
    plus_one = model.config.model_type.startswith("gemma")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            mean = 0.2 if plus_one or name.endswith("bias") else 1.0
            parameter.copy_(mean + 0.3 * noise)
        elif id(parameter) in embeddings:
            parameter.copy_(0.5 * noise + 0.15)
        else:
            parameter.copy_((noise + 0.5) * 0.7 / parameter[0].numel() ** 0.5)


def pico_inputs(model: PreTrainedModel, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for `model`: tokens, a decoder's own tokens for T5, an image at the start of the text for LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(SPECIAL), VOCAB_SIZE, (batch, length), generator=generator)
    inputs = {"input_ids": tokens}
    config = model.config
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(len(SPECIAL), VOCAB_SIZE, (batch, length - 2), generator=generator)
    if config.model_type == "llava":
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens[:, 1 : 1 + patches] = IMAGE
        images = torch.randn((batch, 3, vision.image_size, vision.image_size), generator=generator)
        inputs["pixel_values"] = images.to(model.dtype)
    return inputs


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCAB_SIZE` tokens: one a byte, and the special ones; it speaks ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_pico(path: str | Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Write a pico model and its tokenizer as a Hugging Face folder; returns its path."""
    path = Path(path)
    pico_model(family, seed, **overrides).save_pretrained(path)
    pico_tokenizer().save_pretrained(path)
    return path


def can_balance(family: str, online: Collection[str]) -> bool:
    """Whether `rotate: {balance: true}` finds channels to scale: behind a gate that the map knows, or behind norms."""
    gated = not family.startswith(("opt", "phi3", "t5"))
    return family != "opt-post" if "inputs" in online else gated


def logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of `model` on `inputs`, without gradients."""
    with torch.no_grad():
        scores: Tensor = model(**inputs).logits
    return scores


def with_noise(model: nn.Module) -> PeftModel:
    """An adapter on all linears whose update is not zero."""
    wrapped = add_lora(model, r=3, lora_alpha=6)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return wrapped


def two_steps(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[float]:
    """The loss before each of two steps of AdamW on the same batch, over what is trainable in `model`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def silence_(model: Any, heads: dict[int, list[int]], channels: dict[int, list[int]]) -> None:
    """Zeros where query heads and channels of blocks are read."""
    width = model.config.head_dim
    with torch.no_grad():
        for block, units in heads.items():
            for unit in units:
                model.model.layers[block].self_attn.o_proj.weight[:, unit * width : (unit + 1) * width] = 0
        for block, units in channels.items():
            model.model.layers[block].mlp.down_proj.weight[:, units] = 0
