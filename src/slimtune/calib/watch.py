"""Running a model over text, with someone looking at what its modules read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.calib.capture import model_inputs

Look = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""A forward pre-hook that changes nothing."""


BATCH_SIZE = 4


@torch.no_grad()
def watch(model: nn.Module, tokens: Tensor, looks: Iterable[tuple[str, Look]], *, batch_size: int = BATCH_SIZE) -> None:
    """Run `model` over `tokens` `[samples, length]`, in evaluation mode and the dtype it has; each look is called with
    the module of its name and what that is given. No more logits are made than there have to be; every module is in the
    mode afterwards that it was in.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model, seen = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)), []
        >>> watch(model, torch.zeros(6, 3, dtype=torch.long), [("lm_head", lambda _, args: seen.append(args[0].shape))])
        >>> seen
        [torch.Size([4, 1, 8]), torch.Size([2, 1, 8])]
    """
    modes = {name: module.training for name, module in model.named_modules()}
    handles = [model.get_submodule(name).register_forward_pre_hook(look) for name, look in looks]
    some = "logits_to_keep" in inspect.signature(model.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if some else {}
    try:
        model.eval()
        for batch in tokens.split(batch_size):
            model(**model_inputs(model, batch), **last, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = modes[name]
