"""Keys and values kept in few bits while a model writes: `slimtune.hub.round_cache_` lets attention read no more.

A head's keys (or values) of one token are a row of bytes: a float32 scale, the zero point, and packed codes. With heads
of 128 numbers that is 4.3 bits a number at 4 bits, where bfloat16 has 16. What is read is bit for bit what rounding in
floats gives.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from slimtune.hub import cache_bits, cache_is_turned, mark_rounded
from slimtune.kernels.dispatch import dequantize_affine
from slimtune.linalg.packing import pack
from slimtune.lora.attach import base_of
from slimtune.quant.activation import Activations
from slimtune.rotate.turn import keys_turn

HEAD = 5
"""Bytes before the codes: of a float32 scale, and the zero point."""


def packed_cache(model: PreTrainedModel) -> dict[str, Cache]:
    """An empty cache for `model`, whose keys and values attention rounds to `b` bits, that holds no more than `b`: by
    the name under which the model takes one, so `model.generate(**inputs, **packed_cache(model))`.

    `slimtune generate` uses it by itself. Windows of attention are kept whole. Empty where keys and values are not
    rounded, and for an encoder-decoder: there transformers' own cache is right.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from slimtune.hub import round_cache_
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> round_cache_(model, 4)
        >>> cache = packed_cache(model)
        >>> _ = model(torch.tensor([[1, 2, 3]]), **cache)
        >>> [(layer.keys.dtype, layer.keys.shape) for each in cache.values() for layer in each.layers]
        [(torch.uint8, torch.Size([1, 2, 3, 9]))]
    """
    base = cast(PreTrainedModel, base_of(model))
    bits, turned = cache_bits(base), cache_is_turned(base)
    if bits == 16 or base.config.is_encoder_decoder:
        return {}
    name = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
    count = base.config.get_text_config().num_hidden_layers
    return {name: Cache(layers=[PackedLayer(bits, turned) for _ in range(count)])}


class PackedLayer(DynamicLayer):
    """A layer's keys and values, uint8 `[batch, heads, tokens, bytes]`: what transformers does with a cache along its
    batch and its tokens it does with these. Where `turned`, keys are those that R3 has turned.
    """

    def __init__(self, bits: int, turned: bool) -> None:
        super().__init__()
        self.rounding, self.turned = Activations(bits, sym=False), turned

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Rows of no tokens yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = (self._packed(states[..., :0, :]) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values, float `[batch, heads, tokens, width]`; all there are come back, rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.turned:
            key_states = keys_turn(key_states.shape[-1]).like(key_states)(key_states)
        self.keys = torch.cat([self._rows[0], self._packed(key_states)], dim=-2)
        self.values = torch.cat([self._rows[1], self._packed(value_states)], dim=-2)
        keys, values = (self._read(rows, width) for rows, width in zip(self._rows, self.widths, strict=True))
        return mark_rounded(keys), values

    @property
    def _rows(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def _packed(self, x: Tensor) -> Tensor:
        codes, scale, zero = (part.squeeze(-2) for part in self.rounding.codes(x))
        rows = pack(codes.to(torch.uint8).reshape(-1, x.shape[-1]), self.rounding.bits)
        scales = torch.where(zero.isnan(), zero, scale).to(torch.float32).contiguous().view(torch.uint8)
        return torch.cat([scales, zero.to(torch.uint8), rows.view(*x.shape[:-1], rows.shape[-1])], dim=-1)

    def _read(self, rows: Tensor, width: int) -> Tensor:
        flat = rows.view(-1, rows.shape[-1])
        x = dequantize_affine(
            flat[:, HEAD:].contiguous(),
            flat[:, : HEAD - 1].flatten().view(torch.float32)[:, None],  # a single row may have any stride
            flat[:, HEAD - 1 : HEAD].contiguous(),
            bits=self.rounding.bits,
            group_size=width,
            in_features=width,
            work=torch.float32,
            dtype=self.dtype,
        )
        return x.view(*rows.shape[:-1], width)
