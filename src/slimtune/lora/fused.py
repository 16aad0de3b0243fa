"""A packed linear and its adapter as one function: `y = x Wᵀ + s (x Aᵀ) Bᵀ`.

One function knows what none of its parts do: that the input is kept once for the whole, that nothing frozen has to be
brought to the adapter's dtype, and that both products can be added up inside the matrix product. What is saved for the
backward pass is the input, the `r` numbers a token between A and B, and references to packed tensors and factors; or
where `keep` says so (`slimtune.quant.decoding.kept_weights`) the decoded weight.

The factors keep their own dtype (float32 under PEFT's default, so that small updates are not lost) and are rounded to
the dtype of the input for the product, as autocast does. Of the computation orders of RunLoRA (arXiv 2312.03415) the
ones that stay thin are taken: adding `s B A` to the decoded weight first would need fewer products for long inputs, but
in bfloat16 it rounds the update away.

Where the base rounds its input, the adapter reads it as it came: so do PEFT's own LoRA layers, and engines that serve
adapters on such a base, and the adapter's file has to compute there what it computed here. After a merge there is one
weight and one input, rounded where the merged model is quantized to do so (RoLoRA, arXiv 2407.08044, merges first).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from slimtune.quant.activation import Activations
from slimtune.quant.blackbox import BlackBox
from slimtune.quant.layouts import Layout
from slimtune.quant.linear import QuantLinear
from slimtune.quant.products import times, times_transposed


class _PackedLora(torch.autograd.Function):
    """Gradients to the input and to both factors; the packed tensors are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        activations: Activations | None,
        layout: Layout,
        keep: bool,
        names: tuple[str, ...],
        *packed: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        read = flat if activations is None else activations(flat)
        tensors = dict(zip(names, packed, strict=True))
        weight = layout.dequantize(tensors, x.dtype) if keep else None
        y = times_transposed(read, layout, tensors) if weight is None else read @ weight.T
        low = flat @ a.to(x.dtype).T
        y.addmm_(low, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, low, a, b, *(packed if weight is None else (weight,)))
        ctx.scaling, ctx.layout, ctx.keep, ctx.names = scaling, layout, keep, names
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b, *packed = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        thin = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)
        to_x = to_a = to_b = None
        if ctx.needs_input_grad[1]:
            to_a = (thin.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        if ctx.needs_input_grad[2]:
            to_b = (grad.T @ low).to(b.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            tensors = {} if ctx.keep else dict(zip(ctx.names, packed, strict=True))
            to_x = grad @ packed[0] if ctx.keep else times(grad, ctx.layout, tensors)
            to_x = to_x.addmm_(thin, a.to(grad.dtype)).view_as(x)
        return (to_x, to_a, to_b, *(None,) * (5 + len(ctx.names)))


def fused_lora(x: Tensor, base: QuantLinear | BlackBox, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`base(x) + scaling (x Aᵀ) Bᵀ` in the dtype of `x`, or of autocast.

    Args:
        x: `[..., in_features]`.
        base: the packed linear.
        a: `[r, in_features]`.
        b: `[out_features, r]`.
        scaling: what the adapter's product is multiplied by.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    packed = (getattr(base, name) for name in base.names)
    facts = base.activations, base.layout, base.keep, base.names
    y = cast(Tensor, _PackedLora.apply(x, a, b, scaling, *facts, *packed))
    return y if base.bias is None else y + base.bias.to(y.dtype)
