"""Attention on a CPU: products of whole matrices, with PyTorch's flash kernel where the loops in C do not run forward.

PyTorch's own kernel leaves most of the time, of its backward pass and in bfloat16 of both, to arithmetic between small
products. Here a block of queries meets all of its keys at once, all query heads of a key-value head in one product, so
that keys and values are not repeated. Backward, probabilities are computed again from the scores and their log-sum-exp
(FlashAttention-2, arXiv 2307.08691, section 3.1.2). What is held is one block of about `SCORES` numbers. Measured on
one core with BF16 units and without AMX, bfloat16, 9 heads, 3 of keys, causal: 512 tokens in 5 ms instead of 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.errors import ShapeError
from slimtune.kernels import compiled
from slimtune.kernels.precision import fast_matmul

SCORES = 384 * 1024
"""Numbers in a block of probabilities, about: a few such blocks stay in a core's cache."""

QUERIES = 128
"""Of a block, at most. The fewer, the less is computed of what a causal mask hides."""

FEWEST = 16
"""Queries of a block, at least, however many keys there are."""

FEW = 4
"""Queries up to which none is worth a product of matrices."""

LONGEST = 1024
"""Keys up to which the backward pass is faster than PyTorch's own."""


class _Attention(torch.autograd.Function):
    """`softmax(scale q kᵀ + mask) v`; gradients to `q`, `k` and `v`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        own = q.dtype is torch.bfloat16 and scale > 0 and compiled.fits(q, k, v)
        out, lse = (_blockwise if own else _flash)(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        several = q.shape[1] // k.shape[1]
        with _products(q):
            for batch, few, many, seen in _some_heads(q, k, mask):
                of_queries = [t[batch, many].unflatten(0, (-1, several)) for t in (q, grads[0], lse, out)]
                of_keys = [t[batch, few].to(lse.dtype) for t in (k, v)]
                to_q[batch, many], to_k[batch, few], to_v[batch, few] = _gradients(
                    of_queries, of_keys, seen, ctx.causal, ctx.scale
                )
        return to_q, to_k, to_v, None, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each query, `[batch, heads, queries]`, by PyTorch's kernel."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # it takes that for granted
    if mask is not None:
        mask = mask.to(q.dtype) if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf).to(q.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return cast("tuple[Tensor, Tensor]", flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale))


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, a block of scores at a time."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device="cpu")
    several = q.shape[1] // k.shape[1]
    with _products(q):
        for batch, few, many, seen in _some_heads(q, k, mask):
            across, values = k[batch, few].float().mT.contiguous(), v[batch, few].float()
            queries, to, level = (t[batch, many].unflatten(0, (-1, several)) for t in (q, out, lse))
            for rows, end in _some_queries(several, q.shape[2], k.shape[2], causal):
                p = torch.bmm(queries[:, :, rows].float().flatten(1, 2), across[..., :end])
                by, scores = scale, p.view(*to[:, :, rows].shape[:-1], end)
                if seen is not None and seen.dtype == torch.bool:
                    scores.masked_fill_(~seen[..., rows, :end], -torch.inf)
                elif seen is not None:
                    by = 1.0
                    scores.mul_(scale).add_(seen[..., rows, :end])
                places = {"queries": rows.stop - rows.start, "start": rows.start, "causal": causal}
                level[:, :, rows] = compiled.softmax_(p, by, **places).view(scores.shape[:-1])
                to[:, :, rows] = torch.bmm(p, values[:, :end]).view(to[:, :, rows].shape)
    return out, lse


@contextmanager
def _products(q: Tensor) -> Iterator[None]:
    """Within the block, products in float32 are as exact as `q` is: those of two halves are exact in float32."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    with fast_matmul() if half else nullcontext(), torch.autocast("cpu", enabled=False):
        yield


def _some_heads(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
    """Heads whose scores are worked on together: which of the batch, of keys, and of queries, and their mask, `[1 or
    heads, 1 or several, queries, keys]`."""
    several = q.shape[1] // k.shape[1]
    keys = max(1, k.shape[2])
    step = max(1, SCORES // (several * _queries(several, q.shape[2], keys) * keys))
    for batch in range(len(q)):
        seen = None if mask is None else mask[batch if len(mask) > 1 else 0]
        for start in range(0, k.shape[1], step):
            few = slice(start, min(start + step, k.shape[1]))
            many = slice(few.start * several, few.stop * several)
            some = seen if seen is None or len(seen) == 1 else seen[many].unflatten(0, (-1, several))
            yield batch, few, many, some


def _queries(several: int, length: int, keys: int) -> int:
    """How many queries are in a block."""
    return max(1, min(length, QUERIES, max(FEWEST, SCORES // (several * max(1, keys)))))


def _some_queries(several: int, length: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, and how many keys they see."""
    step = _queries(several, length, keys)
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), min(stop, keys) if causal else keys


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
    for rows, end in _some_queries(several, length, k.shape[1], causal):
        start = rows.start
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


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` takes these: on a CPU, of one dtype that is not float16, with sizes that agree as it says."""
    sides = q, k, v
    if mask is not None:
        wanted = len(q), q.shape[1], q.shape[2], k.shape[2]
        if (
            mask.requires_grad
            or mask.ndim != 4
            or any(a not in (1, b) for a, b in zip(mask.shape, wanted, strict=True))
        ):
            return False
    return (
        all(t.is_cpu and t.dtype == q.dtype != torch.float16 and t.numel() for t in sides)
        and len({(len(t), t.shape[-1]) for t in sides}) == 1
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[1] % k.shape[1] == 0
        and (mask is None or mask.is_cpu)
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`softmax(scale q kᵀ + mask) v`, `[batch, heads, queries, width]`, on a CPU.

    Raises `ShapeError` where `fits` says no.

    Args:
        q: `[batch, heads, queries, width]`.
        k: `[batch, key-value heads, keys, width]`; each serves as many query heads, in their order.
        v: as `k`.
        mask: `[batch, heads, queries, keys]`, or 1 for any of these: what may be seen, or what is added to the scores.
            No gradient.
        causal: a query sees no key behind its own place. Not together with `mask`.
        scale: of the scores; `width ** -0.5` by default.

    Example:
        >>> q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
        >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        >>> bool(torch.allclose(attention(q, k, v, causal=True), wanted, atol=1e-6))
        True
    """
    if not fits(q, k, v, mask):
        given = [(tuple(t.shape), t.dtype) for t in (q, k, v)]
        raise ShapeError("attention of unlike sides", got=given, wanted="sizes that agree and one dtype, on a CPU")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if mask is None else mask.expand(-1, -1, q.shape[2], k.shape[2])
    seen = None if mask is None else mask.dtype == torch.bool
    if q.shape[2] <= FEW and not causal and seen is not False and compiled.fits(q, k, v):
        return compiled.attend(q, k, v, mask, scale)
    return cast(Tensor, _Attention.apply(q, k, v, mask, causal, scale))
