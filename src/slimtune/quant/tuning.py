"""Training what a packed layer has beside its codes: scales of groups, and the sign vectors of a turned basis.

Codes stay; `W` is linear in each of these tensors, so their gradient is that of the weight, summed: for a group's scale
`Σ dW (q - z)`. What trains is a float32 factor for every number, beginning with 1, so that an optimizer's step means
the same for scales of any size. The layer computes with the product rounded to the stored dtype, and the factor gets
the gradient as if it were not (straight-through): what was trained is what is stored in the end, bit for bit.
(EfficientQAT, arXiv 2407.11062, trains scales end to end; QuIP#, arXiv 2402.04396, the signs.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rotated import Lattice, Trellis
from slimtune.quant.scattered import Scattered


def tunable(layout: Layout) -> tuple[str, ...]:
    """The names of the tensors of a layout that can train; none for a layout that is not known here.

    >>> tunable(Affine(8, 64, bits=4, group_size=32)), tunable(Lattice(8, 64, bits=2))
    (('scale',), ('sign_in', 'sign_out'))
    """
    if isinstance(layout, Affine | Scattered) or (isinstance(layout, Codebook) and not layout.nested):
        return ("scale",)
    return ("sign_in", "sign_out") if isinstance(layout, Lattice | Trellis) else ()


def untunable(layouts: Collection[Layout]) -> str:
    """What to do where layers of these layouts are to train, and none can.

    >>> untunable([Codebook(8, 64, "nf4", group_size=32, nested=True)])
    'quantize with double_quant: false, or leave out scales'
    """
    nested = any(isinstance(layout, Codebook) and layout.nested for layout in layouts)
    how = "quantize with double_quant: false" if nested else "quantize with rtn" if layouts else "quantize before"
    return f"{how}, or leave out scales"


class TunedMatmul(torch.autograd.Function):
    """`y = x Wᵀ` with `W = layout.dequantize(tensors)`; gradients to `x`, and to the tensors in `tuned`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: Layout, names: tuple[str, ...], tuned: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        """`x` is `[..., in_features]`; `tensors` are those of the layout in the order of `names`."""
        ctx.save_for_backward(x, *tensors)
        ctx.layout, ctx.names, ctx.tuned = layout, names, tuned
        return x @ layout.dequantize(dict(zip(names, tensors, strict=True)), x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """`dx = dy W`, and `dW = dyᵀ x` carried on to the tensors; `dW` is dropped at once."""
        x, *tensors = ctx.saved_tensors
        grad = grads[0]
        held = dict(zip(ctx.names, tensors, strict=True))
        leaves = {name: held[name].detach().requires_grad_() for name in ctx.tuned}
        with torch.enable_grad():
            weight = ctx.layout.dequantize({**held, **leaves}, grad.dtype)
        to_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        found = dict(zip(leaves, torch.autograd.grad(weight, list(leaves.values()), to_weight), strict=True))
        return (grad @ weight.detach(), None, None, None, *(found.get(name) for name in ctx.names))


class Tuning(nn.Module):
    """The factors of one layer while they train: float32, shaped as the tensors they multiply."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.names = tunable(layer.layout)
        for name in self.names:
            stored = cast(Tensor, getattr(layer, name))
            self.register_parameter(name, nn.Parameter(torch.ones(stored.shape, device=stored.device)))

    def tensors(self, layer: QuantLinear) -> dict[str, Tensor]:
        """The tensors that train, as stored now times their factors: float32, rounded to the stored dtype in value
        alone."""
        made = {}
        for name in self.names:
            stored = cast(Tensor, getattr(layer, name))
            product = stored.float() * cast(Tensor, getattr(self, name))
            made[name] = product + (product.to(stored.dtype).float() - product).detach()
        return made

    def forward(self, x: Tensor, layer: QuantLinear) -> Tensor:
        """`x Wᵀ` with the weight of `layer` as it is trained."""
        made = self.tensors(layer)
        held = [made.get(name, cast(Tensor, getattr(layer, name))) for name in layer.names]
        return cast(Tensor, TunedMatmul.apply(x, layer.layout, layer.names, self.names, *held))


def tune_(model: nn.Module) -> int:
    """Let the scales and signs of every `QuantLinear` of `model` train; returns how many numbers that are."""
    count = 0
    for layer in [module for module in model.modules() if isinstance(module, QuantLinear)]:
        if tunable(layer.layout):
            layer.tuning = Tuning(layer)
            count += sum(parameter.numel() for parameter in layer.tuning.parameters())
    return count


@torch.no_grad()
def settle_tuning_(model: nn.Module) -> float:
    """Store what was trained, in the dtype that it had, and be frozen again; returns the largest relative change."""
    largest = 0.0
    for layer in [module for module in model.modules() if isinstance(module, QuantLinear) and module.tuning]:
        tuning = cast(Tuning, layer.tuning)
        for name, tensor in tuning.tensors(layer).items():
            stored = cast(nn.Parameter, getattr(layer, name))
            largest = max(largest, float((cast(Tensor, getattr(tuning, name)) - 1).abs().max()))
            stored.copy_(tensor)
        layer.tuning = None
    return largest
