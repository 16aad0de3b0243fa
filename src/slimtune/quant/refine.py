"""Making codes on a uniform grid better, one coordinate at a time.

For a weight `W`, a Hessian `H` and `Ŵ = (q - z)·s` the loss `tr((W - Ŵ) H (W - Ŵ)ᵀ)` is a quadratic in every code when
all others stay, and a quadratic in all scales of a row when the codes stay. Both have closed-form minima, so both steps
never raise the loss. Coordinate descent over codes is from QuIP (arXiv 2307.13304, "greedy updates").

Everything here is transposed, `[in, out]`: a column of the weight is one contiguous row. `scale` and `zero` are
`[groups, out]`; a group is `size` input features, the last may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
"""Columns whose corrections are gathered before the rest of the gradient is touched."""

ENTRIES = 2**22
"""Entries of the normal equations that are held at once."""


def descend_(codes: Tensor, w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, size: int, levels: int) -> None:
    """Set every code, first feature to last, to the best one given all others: one sweep, in place.

    Args:
        codes: `[in, out]`, whole floats in `[0, levels]`; changed.
        w: the weight, `[in, out]`.
        h: the Hessian, symmetric, positive on its diagonal, `[in, in]`.
        scale: positive, `[groups, out]`.
        zero: whole floats, `[groups, out]`.
        size: features of a group.
        levels: the largest code.
    """
    columns = len(w)
    spread = torch.arange(columns, device=w.device) // size
    gradient = h @ (w - (codes - zero[spread]) * scale[spread])
    diagonal = h.diagonal().tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        inside, corner = gradient[start:stop], h[start:stop, start:stop]
        steps = torch.empty_like(inside)
        for k, j in enumerate(range(start, stop)):
            s = scale[j // size]
            # The best real code is a gradient step away, whatever the zero point is.
            q = (inside[k] / (diagonal[j] * s)).add_(codes[j]).round_().clamp_(0, levels)
            torch.sub(q, codes[j], out=steps[k])
            steps[k].mul_(s)
            codes[j] = q
            inside.addr_(corner[k], steps[k], alpha=-1)
        gradient[stop:].addmm_(h[stop:, start:stop], steps, alpha=-1)


def refit(codes: Tensor, w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    """The scales of least loss for these codes, bfloat16-representable, `[groups, out]`.

    A scale that would have to shrink below a tenth, or to turn around, stays as it is. Arguments as of `descend_`.
    """
    rows, groups = w.shape[1], len(scale)
    chunk = max(1, ENTRIES // (groups * max(groups, size)))
    parts = []
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        parts.append(_refit(codes[:, part], w[:, part], scale[:, part], zero[:, part], h, size))
    return torch.cat(parts, 1)


def _refit(codes: Tensor, w: Tensor, scale: Tensor, zero: Tensor, h: Tensor, size: int) -> Tensor:
    columns, groups = len(w), len(scale)
    offset = codes - zero[torch.arange(columns, device=w.device) // size]

    def by_group(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, groups * size - columns)).view(groups, size, -1).sum(1)

    rows = [by_group((h[:, k : k + size] @ offset[k : k + size]) * offset) for k in range(0, columns, size)]
    normal = torch.stack(rows).permute(2, 0, 1)  # [out, groups, groups]
    right = by_group((h @ w) * offset).T
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(w.dtype).tiny)
    normal = normal + ridge[:, None, None] * torch.eye(groups, dtype=w.dtype, device=w.device)
    solved, _ = torch.linalg.solve_ex(normal, right)
    best = solved.T.to(torch.bfloat16).to(w.dtype)
    return torch.where(best > 0.1 * scale, best, scale)  # what is not a number stays too
