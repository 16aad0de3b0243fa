"""Attention on a CPU: PyTorch's flash kernel forward, products of whole matrices backward.

PyTorch's own backward pass of that kernel leaves most of the time to arithmetic between its small products. Here the
probabilities of a run of queries are computed again from the scores and their log-sum-exp (FlashAttention-2, arXiv
2307.08691, section 3.1.2), all query heads of a key-value head in one product, so that keys and values are not
repeated. What is held of them is one block of `SCORES` numbers, whatever the length.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.kernels import compiled
from slimtune.kernels.precision import fast_matmul

SCORES = 384 * 1024
"""Numbers in a block of probabilities, about: a few such blocks stay in a core's cache."""

QUERIES = 128
"""Of a block, at most. The fewer, the less is computed of what a causal mask hides."""

LONGEST = 1024
"""Keys up to which this is faster than PyTorch's own."""


class _Attention(torch.autograd.Function):
    """`softmax(scale q kᵀ + mask) v`; gradients to `q`, `k` and `v`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        added = mask
        if mask is not None:
            added = mask.to(q.dtype) if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf).to(q.dtype)
        out, lse = flash(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        several = q.shape[1] // k.shape[1]
        step = max(1, SCORES // (several * min(QUERIES, q.shape[2]) * k.shape[2]))
        half = q.dtype in (torch.bfloat16, torch.float16)  # the products of two such numbers are exact in float32
        with fast_matmul() if half else nullcontext(), torch.autocast("cpu", enabled=False):
            for batch in range(len(q)):
                seen = None if mask is None else mask[batch if len(mask) > 1 else 0]
                for start in range(0, k.shape[1], step):
                    few = slice(start, min(start + step, k.shape[1]))
                    many = slice(few.start * several, few.stop * several)
                    some = seen if seen is None or len(seen) == 1 else seen[many].unflatten(0, (-1, several))
                    of_queries = [t[batch, many].unflatten(0, (-1, several)) for t in (q, grads[0], lse, out)]
                    of_keys = [t[batch, few].to(lse.dtype) for t in (k, v)]
                    to_q[batch, many], to_k[batch, few], to_v[batch, few] = _gradients(
                        of_queries, of_keys, some, ctx.causal, ctx.scale
                    )
        return to_q, to_k, to_v, None, None, None


def _gradients(
    of_queries: list[Tensor], of_keys: list[Tensor], mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some key-value heads: `of_queries` are queries and gradient, `[heads, several, queries, width]`, log-sum-exp
    `[heads, several, queries]`, and the output, as queries; `of_keys` are keys and values, `[heads, keys, width]`;
    `mask` is `[1 or heads, 1 or several, queries, keys]`."""
    (q, grad, lse, out), (k, v) = of_queries, of_keys
    heads, several, length, width = q.shape
    to_q, to_k, to_v = torch.empty(q.shape, dtype=k.dtype), torch.zeros_like(k), torch.zeros_like(v)
    across_k, across_v = k.mT.contiguous(), v.mT.contiguous()
    for start in range(0, length, QUERIES):
        rows = slice(start, min(start + QUERIES, length))
        end = min(rows.stop, k.shape[1]) if causal else k.shape[1]
        queries, ups, read = (t[:, :, rows].to(k.dtype).reshape(heads, -1, t.shape[-1]) for t in (q, grad, out))
        level, part = lse[:, :, rows].reshape(heads, -1, 1), (ups * read).sum(-1, keepdim=True)
        p = torch.bmm(queries, across_k[..., :end])
        to_p = torch.bmm(ups, across_v[..., :end])
        seen = None if mask is None else mask[..., rows, :end]
        if (seen is None or seen.dtype == torch.bool) and compiled.fits(p, level):
            compiled.probabilities_(p, level, scale, queries=rows.stop - start, start=start, causal=causal)
            if seen is not None:
                p.view(heads, several, -1, end).masked_fill_(~seen, 0)
            compiled.slopes_(to_p, p, part)
        else:
            _show_(p.mul_(scale).sub_(level).view(heads, several, -1, end), seen, start, causal)
            to_p.sub_(part).mul_(p)
        to_v[:, :end] += torch.bmm(p.mT, ups)
        to_k[:, :end] += torch.bmm(to_p.mT, queries)
        to_q[:, :, rows] = torch.bmm(to_p, k[:, :end]).view(heads, several, -1, width)
    return to_q.mul_(scale).flatten(0, 1), to_k.mul_(scale), to_v


def _show_(p: Tensor, mask: Tensor | None, start: int, causal: bool) -> None:
    """Scores less their log-sum-exp, of the queries from `start` on, become probabilities: zero for hidden keys."""
    if mask is not None and mask.dtype != torch.bool:
        p += mask
    p.exp_()
    if mask is not None and mask.dtype == torch.bool:
        p.masked_fill_(~mask, 0)
    if causal:
        p.tril_(start)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`softmax(scale q kᵀ + mask) v`, `[batch, heads, queries, width]`, on a CPU.

    Args:
        q: `[batch, heads, queries, width]`.
        k: `[batch, key-value heads, keys, width]`; each serves as many query heads, in their order.
        v: as `k`.
        mask: `[batch or 1, heads or 1, queries, keys]`: what may be seen, or what is added to the scores. No gradient.
        causal: a query sees no key behind its own place. Not together with `mask`.
        scale: of the scores; `width ** -0.5` by default.

    Example:
        >>> q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
        >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        >>> bool(torch.allclose(attention(q, k, v, causal=True), wanted, atol=1e-6))
        True
    """
    return cast(Tensor, _Attention.apply(q, k, v, mask, causal, q.shape[-1] ** -0.5 if scale is None else scale))
