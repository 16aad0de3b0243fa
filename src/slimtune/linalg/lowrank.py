"""The best approximation of a matrix by one of low rank, also where some directions count more than others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.linalg.hessian import inverse_cholesky

EXACT = 2048
"""Up to this many rows or columns the singular vectors are found exactly, beyond it by sketching."""

OVERSAMPLE, PASSES = 16, 6
"""Further directions of a sketch, and how often it is sharpened."""


class Factors(NamedTuple):
    """A matrix of low rank, `b @ a`: `a` is `[rank, in]`, `b` is `[out, rank]`."""

    a: Tensor
    b: Tensor


def low_rank(matrix: Tensor, rank: int, hessian: Tensor | None = None, damp: float = 0.01) -> Factors:
    """The factors of at most `rank` that minimise `tr((M - BA) H (M - BA)ᵀ)`; without `H`, `‖M - BA‖²`.

    With `H = LLᵀ` the loss is `‖ML - BAL‖²`, so `BAL` is the truncated SVD of `ML` (Eckart and Young 1936; LQ-LoRA,
    arXiv 2311.12023; EoRA, arXiv 2410.21271). `BA` comes as `U √S · √S Vᵀ`, its components in falling order.

    Args:
        matrix: `M`, float32 or float64 `[out, in]`.
        rank: at least 1; more than `M` has is cut.
        hessian: `H`, symmetric and not negative, `[in, in]`.
        damp: added to the diagonal of `H`, as a fraction of its mean.

    Example:
        >>> m = torch.outer(torch.arange(3.0), torch.arange(5.0))
        >>> a, b = low_rank(m, rank=2)
        >>> a.shape, b.shape, bool(torch.allclose(b @ a, m, atol=1e-5))
        (torch.Size([2, 5]), torch.Size([3, 2]), True)
    """
    if hessian is None:
        return balanced(*_projected(matrix, rank))
    upper = inverse_cholesky(hessian, damp)[0].to(matrix.dtype)  # L is its inverse
    a, b = _projected(torch.linalg.solve_triangular(upper, matrix, upper=True, left=False), rank)
    return balanced(a @ upper, b)


def _projected(m: Tensor, rank: int) -> Factors:
    """`m` projected onto its first singular vectors, on its shorter side."""
    if m.shape[0] < m.shape[1]:
        a, b = _projected(m.T, rank)
        return Factors(b.T, a.T)
    rank = min(rank, m.shape[1])
    if m.shape[1] <= EXACT:
        wide = m.to(torch.float64)
        vectors = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)
    else:  # Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4
        generator = torch.Generator(m.device).manual_seed(0)
        shape = m.shape[1], min(rank + OVERSAMPLE, m.shape[1])
        basis = torch.randn(shape, generator=generator, dtype=m.dtype, device=m.device)
        for _ in range(PASSES):
            basis = torch.linalg.qr(m.T @ (m @ basis)).Q
        vectors = basis @ torch.linalg.svd(m @ basis, full_matrices=False).Vh.T
    v = vectors[:, :rank].to(m.dtype)
    return Factors(v.T, m @ v)


def balanced(a: Tensor, b: Tensor) -> Factors:
    """The same product by factors of one size: its singular vectors, each with the root of its singular value."""
    (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s.sqrt()
    return Factors(root[:, None] * (vh @ qa.T), (qb @ u) * root)
