"""Gradients on a CPU: norms and attention that compute the same in less time and memory.

They stand in for transformers' own while gradients are taken or a model trains, and are gone afterwards: nothing of a
model or its configuration changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimtune.arch import bind
from slimtune.kernels.attention import LONGEST, attention
from slimtune.kernels.rows import rms_norm

USUAL = "sdpa"
"""What transformers calls PyTorch's attention, and a model uses where nothing else is asked for."""


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """Within the block, gradients of `model` (a Hugging Face model, not its `PeftModel`) on a CPU take less time.

    Frozen RMS norms run as `slimtune.kernels.rows.rms_norm`, PyTorch's attention as `slimtune.kernels.attention`, where
    a gradient is wanted of either. Elsewhere than on a CPU nothing changes.
    """
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    with ExitStack() as stack:
        modelmap, modules = bind(model), dict(model.named_modules())
        for norm in modelmap.norms:
            module = modules[norm.name]
            if norm.kind != "layer" and not cast(Tensor, module.weight).requires_grad and "forward" not in vars(module):
                cast(Any, module).forward = partial(_norm, module, norm.kind == "rms_plus_one", modelmap.epsilon)
                stack.callback(module.__delattr__, "forward")
        stack.enter_context(_attending())
        yield


@contextmanager
def _attending() -> Iterator[None]:
    """`_attention` in the place of PyTorch's."""
    if ALL_ATTENTION_FUNCTIONS[USUAL] is _attention:
        yield
        return
    ALL_ATTENTION_FUNCTIONS[USUAL] = _attention  # for this process alone: transformers keeps its own beside it
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[USUAL]


def _norm(module: nn.Module, plus_one: bool, epsilon: float, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, type(module).forward(module, x))
    gain = cast(Tensor, module.weight).to(torch.promote_types(x.dtype, torch.float32))
    return rms_norm(x, 1 + gain if plus_one else gain, epsilon)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' interface to attention: `[batch, heads, tokens, width]` in, `[batch, tokens, heads, width]` out."""
    sides = [query, key, value]
    if torch.is_autocast_enabled("cpu"):
        sides = [t.to(torch.get_autocast_dtype("cpu")) for t in sides]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    if (
        not torch.is_grad_enabled()
        or dropout
        or query.dtype is torch.float16
        or key.shape[2] > LONGEST
        or (causal and key.shape[2] != query.shape[2])
        or key.shape[-1] != value.shape[-1]
        or (attention_mask is not None and (attention_mask.requires_grad or attention_mask.ndim != 4))
        or any(others.get(name) is not None for name in ("position_bias", "cache", "softcap", "output_attentions"))
    ):
        rest = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    y = attention(sides[0], sides[1], sides[2], mask=attention_mask, causal=causal, scale=scaling)
    return y.transpose(1, 2).contiguous(), None
