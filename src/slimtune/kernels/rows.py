"""A norm on a CPU: all of it for a few rows before the next rows.

Written as single operations on whole tensors, a norm reads and writes its activations from memory once for each of
them, and saves some in float32. Here a run of rows stays in the core's cache from the first operation to the last, and
the input is saved and one number a row. Arithmetic is in float32 (float64 where the input is), rounded once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

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
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        inverse = torch.empty((*x.shape[:-1], 1), dtype=gain.dtype)
        for some, scale, to in _runs(x, inverse, y):
            work = some.to(gain.dtype, copy=True)
            square = torch.linalg.vector_norm(work, dim=-1, keepdim=True).square_()
            torch.rsqrt(square.div_(x.shape[-1]).add_(epsilon), out=scale)
            to.copy_(work.mul_(scale).mul_(gain))
        ctx.save_for_backward(x, gain, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for some, scale, up, to in _runs(x, inverse, grads[0], to_x):
            work, grad = some.to(gain.dtype, copy=True), up.to(gain.dtype, copy=True).mul_(gain)
            along = (work * grad).sum(-1, keepdim=True).mul_(scale.square()).div_(-x.shape[-1])
            to.copy_(grad.add_(work.mul_(along)).mul_(scale))
        return to_x, None, None


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """`x * gain / sqrt(mean(x²) + epsilon)` over the last dimension, in the dtype of `x`; `gain` is frozen.

    Example:
        >>> x, gain = torch.randn(5, 8), torch.rand(8)
        >>> bool(torch.allclose(rms_norm(x, gain, 1e-6), torch.nn.functional.rms_norm(x, (8,), gain, 1e-6), atol=1e-6))
        True
    """
    return cast(Tensor, _RmsNorm.apply(x, gain.to(torch.promote_types(x.dtype, torch.float32)), epsilon))
