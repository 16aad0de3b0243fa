"""Norms, gates and RoPE on a CPU: all of it for a few rows before the next rows.

Written as single operations on whole tensors, a norm reads and writes its activations from memory once for each of
them, and saves some in float32. Here a run of rows stays in the core's cache from the first operation to the last, and
the input is saved and one number a row; who reads a norm or a gate need not save it (`slimtune.kernels.remake`).
Arithmetic is in float32 (float64 where the input is), rounded once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from slimtune.kernels import compiled
from slimtune.kernels.remake import remade

NUMBERS = 64 * 1024
"""How many numbers of a tensor are worked on at once."""


def _runs(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors, `[..., width]`, as runs of rows."""
    flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
    step = max(1, NUMBERS // flat[0].shape[1])
    return list(zip(*(t.split(step) for t in flat), strict=True))


class _RmsNorm(torch.autograd.Function):
    """`x gain / rms(x)`; a gradient to `x` only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        y, inverse = _normed(x, gain, epsilon)
        ctx.save_for_backward(x, gain, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        if compiled.fits(x, gain):
            return compiled.norm_backward(x, gain, inverse, grads[0].to(x.dtype)), None, None
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for some, scale, up, to in _runs(x, inverse, grads[0], to_x):
            work, grad = some.to(gain.dtype, copy=True), up.to(gain.dtype, copy=True).mul_(gain)
            along = (work * grad).sum(-1, keepdim=True).mul_(scale.square()).div_(-x.shape[-1])
            to.copy_(grad.add_(work.mul_(along)).mul_(scale))
        return to_x, None, None


def _normed(x: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm, and the inverse of the root mean square of each row."""
    if compiled.fits(x, gain):
        return compiled.norm(x, gain, epsilon)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse = torch.empty((*x.shape[:-1], 1), dtype=gain.dtype)
    for some, scale, to in _runs(x, inverse, y):
        work = some.to(gain.dtype, copy=True)
        square = torch.linalg.vector_norm(work, dim=-1, keepdim=True).square_()
        torch.rsqrt(square.div_(x.shape[-1]).add_(epsilon), out=scale)
        to.copy_(work.mul_(scale).mul_(gain))
    return y, inverse


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """`x * gain / sqrt(mean(x²) + epsilon)` over the last dimension, in the dtype of `x`; `gain` is frozen.

    Example:
        >>> x, gain = torch.randn(5, 8), torch.rand(8)
        >>> bool(torch.allclose(rms_norm(x, gain, 1e-6), torch.nn.functional.rms_norm(x, (8,), gain, 1e-6), atol=1e-6))
        True
    """
    gain = gain.to(torch.promote_types(x.dtype, torch.float32))
    y = cast(Tensor, _RmsNorm.apply(x, gain, epsilon))
    return remade(y, lambda x, gain: _normed(x, gain, epsilon)[0], x, gain)


class _Gated(torch.autograd.Function):
    """`silu(gate) value`, of which only the two are saved."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return compiled.gated(gate, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return compiled.gated_backward(gate, value, grads[0].to(gate.dtype))


def gated_silu(gate: Tensor, value: Tensor) -> Tensor:
    """`silu(gate) * value`: rounded once, where the plain product rounds twice.

    Example:
        >>> gate, value = torch.randn(5, 8), torch.randn(5, 8)
        >>> bool(torch.allclose(gated_silu(gate, value), torch.nn.functional.silu(gate) * value, atol=1e-6))
        True
    """
    if gate.dtype == value.dtype and compiled.fits(gate.detach(), value.detach()):
        return remade(cast(Tensor, _Gated.apply(gate, value)), compiled.gated, gate, value)
    return silu(gate) * value


class _Turned(torch.autograd.Function):
    """RoPE of queries or keys; the tables have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return compiled.turn(x.transpose(1, 2), cosine, sine).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        up = grads[0].to(cosine.dtype).transpose(1, 2)
        return compiled.turn(up, cosine, sine, back=True).transpose(1, 2), None, None


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) with the two halves of a head as pairs: `x cos + (-x2, x1) sin`.

    Args:
        x: queries or keys, `[batch, heads, tokens, width]`.
        cosine: `[batch or 1, tokens, width]`, of the dtype of `x`.
        sine: as `cosine`.

    Example:
        >>> x, cosine, sine = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
        >>> turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        >>> wanted = x * cosine.unsqueeze(1) + turned * sine.unsqueeze(1)
        >>> bool(torch.allclose(rotary(x, cosine, sine), wanted, atol=1e-6))
        True
    """
    if x.dtype == cosine.dtype and compiled.fits(x.detach(), cosine, sine):
        tables = (t.expand(len(x), *t.shape[1:]) for t in (cosine, sine))
        return cast(Tensor, _Turned.apply(x, *tables))
    cosine, sine, half = cosine.unsqueeze(1), sine.unsqueeze(1), x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine
