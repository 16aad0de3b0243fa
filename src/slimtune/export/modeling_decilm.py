"""A model whose blocks differ in width, for transformers: slimtune writes this file into its `decilm` exports."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM

from .configuration_decilm import DeciLMConfig


class Absent(nn.Module):
    """Zeros in the place of an attention, which hands out its weights as well, or of a feed-forward layer."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Zeros `[batch, length, hidden]`."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


class DeciLMDecoderLayer(MistralDecoderLayer):
    """One block, as wide as its entry in `block_configs` says; a sub-layer that is not there has no norm either."""

    def __init__(self, config: DeciLMConfig, layer_idx: int) -> None:
        own, block = copy(config), config.block_configs[layer_idx]
        if not block.attention.no_op:
            own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        own.intermediate_size = 1 if block.ffn.no_op else block.ffn.intermediate_size
        super().__init__(own, layer_idx)
        attention, mlp = self.self_attn, self.mlp
        attention.config = mlp.config = config  # one for all, should the kind of attention be changed later
        biased = [attention.q_proj, attention.k_proj, attention.v_proj] if config.qkv_bias else []
        biased += [attention.o_proj] if config.attention_bias else []
        biased += [mlp.gate_proj, mlp.up_proj, mlp.down_proj] if config.mlp_bias else []
        for linear in biased:
            linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        modules: dict[str, Any] = self._modules
        if block.attention.no_op:
            modules.update(input_layernorm=nn.Identity(), self_attn=Absent(attention=True))
        if block.ffn.no_op:
            modules.update(post_attention_layernorm=nn.Identity(), mlp=Absent(attention=False))


class DeciLMForCausalLM(MistralForCausalLM):
    """The model that a `DeciLMConfig` describes."""

    config_class = DeciLMConfig
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(DeciLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()
