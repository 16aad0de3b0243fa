"""A model on a CPU: norms, attention, RoPE and gates that compute the same in less time and memory.

They stand in for transformers' own while a model trains, writes or is measured, and are gone afterwards: nothing of a
model or its configuration changes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from slimtune.arch import bind
from slimtune.arch.bind import Block, ModelMap
from slimtune.errors import ShapeError, UnknownArchitecture
from slimtune.kernels.attention import LONGEST, attention, fits
from slimtune.kernels.rows import gated_silu, rms_norm, rotary

USUAL = "sdpa"
"""What transformers calls PyTorch's attention, and a model uses where nothing else is asked for."""

ROPE = "apply_rotary_pos_emb"
"""What transformers calls RoPE, in the file of every family."""


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` (a Hugging Face model, not its `PeftModel`) and its gradients take less time on a CPU.

    RMS norms whose gains do not train, gates by SiLU and RoPE as Llama has it run as `slimtune.kernels.rows`,
    PyTorch's attention as `slimtune.kernels.attention`. Elsewhere than on a CPU, and of a model without a map, nothing
    changes.
    """
    modelmap = _map(model) if next(model.parameters()).device.type == "cpu" else None
    if modelmap is None:
        yield
        return
    with ExitStack() as stack:
        modules = dict(model.named_modules())
        for norm in modelmap.norms:
            module = modules[norm.name]
            if norm.kind != "layer":
                plus_one = norm.kind == "rms_plus_one"
                stack.enter_context(_running(module, partial(_norm, module, plus_one, modelmap.epsilon)))
        for block in modelmap.blocks:
            if block.gated and (parts := _parts(modules[block.gated], block)):
                stack.enter_context(_running(modules[block.gated], partial(_gated, modules[block.gated], parts)))
        stack.enter_context(_attending())
        for home in sorted({type(modules[block.name]).__module__ for block in modelmap.blocks}):
            stack.enter_context(_turning(sys.modules[home]))
        yield


def _map(model: nn.Module) -> ModelMap | None:
    try:
        return bind(model)
    except (UnknownArchitecture, ShapeError):
        return None


@contextmanager
def _running(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`forward` in the place of the module's own; a module whose forward someone else replaced keeps that."""
    if "forward" in vars(module):
        yield
        return
    cast(Any, module).forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)  # another thread may have been here


def _parts(module: nn.Module, block: Block) -> list[str] | None:
    """The three linears of a feed-forward layer with a gate by SiLU, by name: surgery replaces them; `None` of any
    other layer."""
    names = [port.name.rpartition(".")[2] for port in block.ports if port.name.startswith(f"{block.gated}.")]
    rest = [child for name, child in module.named_children() if name not in names]
    if len(names) != 3 or len(rest) != 1 or not isinstance(rest[0], (nn.SiLU, SiLUActivation)):
        return None
    return names


def _gated(module: nn.Module, parts: list[str], x: Tensor) -> Tensor:
    gate, value, out = (module.get_submodule(name) for name in parts)
    return cast(Tensor, out(gated_silu(gate(x), value(x))))


@contextmanager
def _attending() -> Iterator[None]:
    """`_attention` in the place of PyTorch's, unless something else is there already."""
    if ALL_ATTENTION_FUNCTIONS[USUAL] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS[USUAL] = _attention  # for this process alone: transformers keeps its own beside it
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS[USUAL] is _attention:
            del ALL_ATTENTION_FUNCTIONS[USUAL]


@contextmanager
def _turning(home: ModuleType) -> Iterator[None]:
    """`_rotary` in the place of RoPE in a file of transformers, where that is as Llama's."""
    usual = vars(home).get(ROPE)
    if (
        usual is None
        or isinstance(usual, partial)
        or inspect.getsource(usual) != inspect.getsource(apply_rotary_pos_emb)
    ):
        yield
        return
    setattr(home, ROPE, partial(_rotary, usual))
    try:
        yield
    finally:
        setattr(home, ROPE, usual)


def _rotary(
    usual: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    if rest or others or cos.requires_grad:
        return usual(q, k, cos, sin, *rest, **others)
    return rotary(q, cos, sin), rotary(k, cos, sin)


def _norm(module: nn.Module, plus_one: bool, epsilon: float, x: Tensor) -> Tensor:
    weight = cast(Tensor, module.weight)
    if (weight.requires_grad and torch.is_grad_enabled()) or (weight.dtype != x.dtype and not plus_one):
        return cast(Tensor, type(module).forward(module, x))
    gain = weight.detach().to(torch.promote_types(x.dtype, torch.float32))
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
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in sides)
    if (
        dropout
        or not fits(sides[0], sides[1], sides[2], attention_mask)
        or (learning and key.shape[2] > LONGEST)
        or (causal and key.shape[2] != query.shape[2])
        or any(others.get(name) is not None for name in ("position_bias", "cache", "softcap", "output_attentions"))
    ):
        rest = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    y = attention(sides[0], sides[1], sides[2], mask=attention_mask, causal=causal, scale=scaling)
    return y.transpose(1, 2).contiguous(), None
