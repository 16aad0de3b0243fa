"""Packed linears that read one input, and their adapters, as one function: `y = x Wᵀ + s (x Aᵀ) Bᵀ` of each.

One function knows what none of its parts do: that the input is kept once for the whole, that nothing frozen has to be
brought to the adapter's dtype, that all that goes back to the input can be added up inside the matrix products, and
that the thin products of linears side by side (queries, keys and values; gate and up) are one. What is saved for the
backward pass is the input (of the output of a norm or gate, what it is made of: `slimtune.kernels.remake`), the `r`
numbers a token between A and B, and references to packed tensors and factors; or where `keep` says so
(`slimtune.quant.decoding.kept_weights`) the decoded weight.

The factors keep their own dtype (float32 under PEFT's default, so that small updates are not lost) and are rounded to
the dtype of the input for the product, as autocast does. Of the computation orders of RunLoRA (arXiv 2312.03415) the
ones that stay thin are taken: adding `s B A` to the decoded weight first would need fewer products for long inputs, but
in bfloat16 it rounds the update away.

Where the base rounds its input, the adapter reads it as it came: so do PEFT's own LoRA layers, and engines that serve
adapters on such a base, and the adapter's file has to compute there what it computed here. After a merge there is one
weight and one input, rounded where the merged model is quantized to do so (RoLoRA, arXiv 2407.08044, merges first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from slimtune.kernels.remake import Remake, remake_of
from slimtune.quant.activation import Activations
from slimtune.quant.blackbox import BlackBox
from slimtune.quant.layouts import Layout
from slimtune.quant.linear import QuantLinear
from slimtune.quant.products import times, times_transposed


class Adapted(NamedTuple):
    """A packed linear with its factors: `a` is `[r, in_features]`, `b` `[out_features, r]`."""

    base: QuantLinear | BlackBox
    a: Tensor
    b: Tensor
    scaling: float


class _Facts(NamedTuple):
    """What of a linear is no tensor; its tensors are A, B and then `names`."""

    scaling: float
    activations: Activations | None
    layout: Layout
    keep: bool
    names: tuple[str, ...]


class _PackedLora(torch.autograd.Function):
    """Gradients to the input and to all factors; the packed tensors are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, facts: tuple[_Facts, ...], remake: Remake | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """`tensors` are those of one linear after the other."""
        flat, outputs, saved, rest = x.reshape(-1, x.shape[-1]), [], [], list(tensors)
        own = [[rest.pop(0) for _ in range(2 + len(fact.names))] for fact in facts]
        low = flat @ _joined([a.to(x.dtype) for a, *_ in own]).T
        lows = low.split([len(a) for a, *_ in own], 1)
        read: dict[Activations | None, Tensor] = {None: flat}
        for fact, (a, b, *packed), part in zip(facts, own, lows, strict=True):
            if fact.activations is not None and fact.activations not in read:
                read[fact.activations] = fact.activations(flat)
            stored = dict(zip(fact.names, packed, strict=True))
            if fact.keep:
                packed = [fact.layout.dequantize(stored, x.dtype)]
                y = read[fact.activations] @ packed[0].T
            else:
                y = times_transposed(read[fact.activations], fact.layout, stored)
            y.addmm_(part, b.to(x.dtype).T, alpha=fact.scaling)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
            saved += [a, b, *packed]
        ctx.save_for_backward(low, *saved, *((x,) if remake is None else remake.of))
        ctx.set_materialize_grads(False)
        ctx.facts, ctx.make = facts, None if remake is None else remake.make
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """An output that nothing was made of has no gradient, and neither have its factors."""
        low, *rest = ctx.saved_tensors
        own = [[rest.pop(0) for _ in range(3 if fact.keep else 2 + len(fact.names))] for fact in ctx.facts]
        x = rest[0] if ctx.make is None else ctx.make(*rest)
        lows = low.split([len(a) for a, *_ in own], 1)
        wanted = iter(ctx.needs_input_grad[3:])
        found: list[list[Tensor | None]] = []
        thin, read, to_x, to_factors = [], [], None, False
        for fact, grad, (a, b, *packed), part in zip(ctx.facts, grads, own, lows, strict=True):
            wants = [next(wanted) for _ in range(2 + len(fact.names))]
            found.append([None] * len(wants))
            if grad is None:
                continue
            grad = grad.reshape(-1, grad.shape[-1])
            if wants[1]:
                found[-1][1] = (grad.T @ part).to(b.dtype).mul_(fact.scaling)
            to_factors = to_factors or wants[0]
            thin.append((grad @ b.to(grad.dtype)).mul_(fact.scaling))
            read.append(a)
            if ctx.needs_input_grad[0] and fact.keep:
                to_x = grad @ packed[0] if to_x is None else to_x.addmm_(grad, packed[0])
            elif ctx.needs_input_grad[0]:
                to_x = times(grad, fact.layout, dict(zip(fact.names, packed, strict=True)), onto=to_x)
        if thin:
            together = _joined(thin, 1)
            if to_x is not None:
                to_x = to_x.addmm_(together, _joined([a.to(together.dtype) for a in read])).view_as(x)
        if to_factors:
            to_read = iter((together.T @ x.reshape(-1, x.shape[-1])).split([len(a) for a in read]))
            for grad, (a, *_), to in zip(grads, own, found, strict=True):
                to[0] = None if grad is None else next(to_read).to(a.dtype)
        return (to_x, None, None, *(tensor for to in found for tensor in to))


def fused_lora(x: Tensor, readers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """`base(x) + scaling (x Aᵀ) Bᵀ` of each of `readers`, in the dtype of `x`, or of autocast.

    `x` is `[..., in_features]`, each result `[..., out_features]` of its linear.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    facts, tensors = [], []
    for base, a, b, scaling in readers:
        facts.append(_Facts(scaling, base.activations, base.layout, base.keep, base.names))
        tensors += [a, b, *(getattr(base, name) for name in base.names)]
    found = cast(tuple[Tensor, ...], _PackedLora.apply(x, tuple(facts), remake_of(x), *tensors))
    biases = [reader.base.bias for reader in readers]
    return tuple(y if bias is None else y + bias.to(y.dtype) for y, bias in zip(found, biases, strict=True))


class Reader(Protocol):
    """A layer that may run as such a function, and which others it may do so with."""

    side_by_side: SideBySide | None

    def plain_parts(self) -> Adapted | None:
        """What of; `None` where it may not, now."""


class SideBySide:
    """Adapted packed linears that read one input, one after the other: the first that is asked computes for all.

    Where they turn out to be given different tensors, each computes for itself from then on.
    """

    def __init__(self, layers: Sequence[Reader]) -> None:
        self.layers, self._apart = tuple(layers), False
        self._x: Tensor | None = None
        self._ready: dict[Reader, Tensor] = {}

    def output(self, layer: Reader, x: Tensor) -> Tensor | None:
        """The output of `layer`, or `None` if it has to see to it itself: without gradients there is little to gain."""
        if self._apart or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self._x is not x or layer not in self._ready:
            self._apart = self._x is not x and bool(self._ready)
            parts = [each.plain_parts() for each in self.layers]
            if self._apart or None in parts:
                self.forget()
                return None
            ready = fused_lora(x, cast(list[Adapted], parts))
            self._x, self._ready = x, dict(zip(self.layers, ready, strict=True))
        found = self._ready.pop(layer)
        if not self._ready:
            self.forget()
        return found

    def forget(self) -> None:
        """Hold no tensor."""
        self._x, self._ready = None, {}


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
