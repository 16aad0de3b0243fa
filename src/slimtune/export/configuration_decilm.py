"""The configuration of a model whose blocks differ in width: slimtune writes this file into its `decilm` exports."""

from typing import Any

from transformers import MistralConfig


class Fields(dict[str, Any]):
    """An object of JSON whose values are attributes as well, as vLLM reads them.

    Example:
        >>> Fields(no_op=True).no_op, hasattr(Fields(no_op=True), "ffn_mult")
        (True, False)
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(MistralConfig):
    """Of each block `attention` (`no_op`, `n_heads_in_group`: the query heads of one key-value head) and `ffn`
    (`no_op`, `intermediate_size`); and which linears have biases (`attention_bias`: the output's)."""

    model_type = "nemotron-nas"
    _auto_class = "AutoConfig"
    block_configs: list[Any] | tuple[Any, ...] = ()
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_configs = [Fields({k: Fields(v) for k, v in block.items()}) for block in self.block_configs]
        super().__post_init__(**kwargs)
