"""`QuantLinear`: a linear layer whose frozen weight is a `QTensor`, trainable through its input (and so through
LoRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from slimtune.linalg.lowrank import Factors
from slimtune.quant.activation import Activations
from slimtune.quant.autograd import DequantizingMatmul
from slimtune.quant.base import QTensor
from slimtune.quant.float8 import float8_product, in_float8
from slimtune.quant.integer import in_integers, integer_product
from slimtune.quant.layouts import Affine, Layout
from slimtune.quant.products import Product
from slimtune.quant.select import select

FEW = 32
"""Rows up to which a product made for a few (`slimtune.quant.decoding`) is used."""


class QuantLinear(nn.Module):
    """`y = x Wᵀ + b` with `W` stored in few bits.

    The packed tensors are frozen, contiguous `nn.Parameter`s named as the layout names them, dim 0 = out_features: they
    appear in `state_dict` as plain tensors and shard under FSDP2 without special code. The layout is plain data on the
    module. Runs in the dtype of its input (or autocast's), float32, bfloat16 or float16. With `activations` the input
    is rounded before the product; gradients pass through the rounding as if it were not there.

    Example:
        >>> from slimtune.quant.rtn import Rtn
        >>> linear = nn.Linear(96, 8)
        >>> q = QuantLinear.from_linear(linear, Rtn(bits=8, group_size=32)(linear.weight.detach(), {}))
        >>> x = torch.randn(2, 96)
        >>> bool(torch.allclose(q(x), linear(x), atol=0.02))
        True
    """

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activations: Activations | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.activations = activations
        self.in_features = layout.in_features
        self.out_features = layout.out_features
        self.names = tuple(layout.tensors())
        for name, (shape, kind) in layout.tensors().items():
            self.register_parameter(name, _frozen(torch.empty(shape, dtype=kind, device=device)))
        self.bias = _frozen(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.start: Factors | None = None  # what an adapter on this layer may start from; not saved with it
        self.tuning: nn.Module | None = None  # see slimtune.quant.tuning; not saved with the layer
        self.small: Product | None = None  # see slimtune.quant.decoding
        self.keep = False  # whether a gradient finds the weight as forward decoded it; see slimtune.quant.decoding

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight: QTensor, activations: Activations | None = None) -> QuantLinear:
        """The quantized twin of `linear`: same bias (frozen, shared), `weight` instead of its weight."""
        module = cls(weight.layout, bias=False, device="meta", activations=activations)
        for name, tensor in weight.tensors.items():
            setattr(module, name, _frozen(tensor.to(linear.weight.device)))
        if linear.bias is not None:
            module.bias = _frozen(linear.bias.detach())
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[..., in_features]`; returns `[..., out_features]` in the dtype of `x`, or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tensors = {name: getattr(self, name) for name in self.names}
        y: Tensor
        rounding = self.activations if self.tuning is None else None
        if rounding is not None and in_integers(x, rounding, self.layout):
            y = integer_product(x, rounding, cast(Affine, self.layout), tensors)
        elif rounding is not None and in_float8(x, rounding, self.layout):
            y = float8_product(x, rounding, self.layout, tensors)
        else:
            read = x if self.activations is None else self.activations(x)
            if self.tuning is not None:
                y = self.tuning(read, self)
            elif self.small is not None and not torch.is_grad_enabled() and x.numel() <= FEW * self.in_features:
                y = self.small(read)
            else:
                y = DequantizingMatmul.apply(read, self.layout, self.names, *tensors.values())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The first packed tensor seen as int8: for code that asks a linear for its weight's device or dtype.

        PEFT places new adapters by it and leaves their dtype alone, since int8 is not a float; transformers' T5 does
        not cast its activations to it. It is not the weight: that is `dequantize()`.
        """
        first: Tensor = getattr(self, self.names[0]).detach()
        return first.view(torch.int8)

    @property
    def qtensor(self) -> QTensor:
        """The stored weight."""
        return QTensor({name: getattr(self, name).detach() for name in self.names}, self.layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the layer computes with, `dtype [out_features, in_features]`."""
        return self.qtensor.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A dense, frozen twin in `dtype`. It does not round its input: its weight is of 16 bits again."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = _frozen(self.dequantize(dtype))
        if self.bias is not None:
            linear.bias = _frozen(self.bias.detach().to(dtype))
        return linear.train(self.training)

    def select(self, rows: Tensor | None, columns: Tensor | None) -> tuple[QuantLinear, str]:
        """The layer of these rows and columns (None: all), and why its weight was rounded again ("" if it was not)."""
        weight, reason = select(self.qtensor, rows, columns)
        module = QuantLinear(weight.layout, bias=False, device="meta", activations=self.activations)
        for name, tensor in weight.tensors.items():
            setattr(module, name, _frozen(tensor))
        if self.bias is not None:
            module.bias = self.bias if rows is None else _frozen(self.bias.detach()[rows.to(self.bias.device)])
        return module.train(self.training), reason

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `model.half()` and the like move packed tensors but never change their dtype: that would change the weight.
        kept = {name: getattr(self, name).data for name in self.names}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, _frozen(tensor.to(moved.device)))
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        rounded = f", activations={self.activations}" if self.activations is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, layout={self.layout}{rounded}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
