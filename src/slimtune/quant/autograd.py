"""A matrix product with a weight that is dequantized on the way and forgotten (ModuLoRA, arXiv 2309.16119, section 3).

Forward decodes the weight, multiplies and drops it; backward decodes it again. What is kept between the two are
references to the packed tensors, nothing else: not the weight, and not the input, since frozen codes have no gradient.
The function knows a layout only by its `dequantize`, so it serves any quantizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.quant.layouts import Layout
from slimtune.quant.products import times, times_transposed


class DequantizingMatmul(torch.autograd.Function):
    """`y = x Wᵀ` with `W = layout.dequantize(tensors)`; gradient to `x` only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        """`x` is `[..., in_features]`; `tensors` are the packed tensors in the order of `names`."""
        ctx.save_for_backward(*tensors)
        ctx.layout, ctx.names = layout, names
        flat = x.reshape(-1, x.shape[-1])
        y = times_transposed(flat, layout, dict(zip(names, tensors, strict=True)))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """`dx = dy W`; `None` for everything that is frozen."""
        (grad,) = grads
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        nothing = (None,) * (2 + len(tensors))
        to_x = times(grad.reshape(-1, grad.shape[-1]), ctx.layout, tensors)
        return (to_x.view(*grad.shape[:-1], to_x.shape[-1]), *nothing)
