"""The leading singular triples of a matrix that is never formed, from its products with thin matrices.

`Y = G P` and `Z = Q G` are linear in `G`: they add up over whatever `G` is a sum of. Gaussian `P` and `Q` come back
from their seed. The theory is that of Halko, Martinsson and Tropp (arXiv 0909.4061) and, for one pass, of Tropp,
Yurtsever, Udell and Cevher (arXiv 1609.00048).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Triples(NamedTuple):
    """`U diag(s) Vᵀ`: `u` is `[out, k]`, `s` `[k]` in falling order, `v` `[in, k]`, both with orthonormal columns."""

    u: Tensor
    s: Tensor
    v: Tensor

    def first(self, rank: int) -> Triples:
        """The `rank` leading ones."""
        return Triples(self.u[:, :rank], self.s[:rank], self.v[:, :rank])


def gaussian(rows: int, columns: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Independent standard normal numbers, float32 `[rows, columns]`, the same on every device and in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(device)


def exact(matrix: Tensor, rank: int) -> Triples:
    """The leading triples by a full SVD in float64: what the others are measured by."""
    u, s, vh = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    return _signed(u, s, vh, rank, matrix.dtype)


def one_pass(y: Tensor, z: Tensor, left: Tensor, rank: int) -> Triples:
    """The leading triples of `G` from `Y = G Ω` and `Z = Ψ G`, both taken in one pass over what `G` is a sum of.

    `Q` is an orthonormal basis of the range of `Y`; `G ≈ Q X`, where `X` solves `(Ψ Q) X = Z` by least squares.

    Args:
        y: `[out, k]`, `k` at least `rank`.
        z: `[l, in]`, `l` at least `k`; `3 k / 2` or more keeps the least squares well posed.
        left: `Ψ`, `[l, out]`.
        rank: how many triples.

    Example:
        >>> g = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 8))
        >>> omega, psi = gaussian(7, 3, seed=0), gaussian(6, 5, seed=1)
        >>> u, s, v = one_pass(g @ omega, psi @ g, psi, rank=1)
        >>> bool(torch.allclose(s * u @ v.T, g, atol=1e-4))
        True
    """
    q = orthonormal(y)
    basis, corner = torch.linalg.qr(left.to(torch.float64) @ q.to(torch.float64))
    x = torch.linalg.solve_triangular(corner, basis.T @ z.to(torch.float64), upper=True)
    return from_left(q, x, rank)


def from_left(q: Tensor, z: Tensor, rank: int) -> Triples:
    """The leading triples of `Q Z`, where `Q` `[out, k]` has orthonormal columns and `Z` is `[k, in]`."""
    basis, corner = torch.linalg.qr(z.to(torch.float64).T)  # [in, k], [k, k]
    small_u, s, small_vh = torch.linalg.svd(corner.T)
    return _signed(q.to(torch.float64) @ small_u, s, small_vh @ basis.T, rank, q.dtype)


def from_right(y: Tensor, p: Tensor, rank: int) -> Triples:
    """The leading triples of `Y Pᵀ`, where `P` `[in, k]` has orthonormal columns and `Y` is `[out, k]`."""
    v, s, u = from_left(p, y.T, rank)
    return _signed(u, s, v.T, rank, p.dtype)


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the range of a tall `matrix`, in its dtype."""
    q: Tensor = torch.linalg.qr(matrix.to(torch.float64)).Q
    return q.to(matrix.dtype)


def overlap(first: Tensor, second: Tensor) -> float:
    """How much of one subspace lies in another, 0 to 1: `‖V₁ᵀ V₂‖² / r`, for orthonormal columns `[n, r]`."""
    return float((first.T @ second).square().sum()) / min(first.shape[1], second.shape[1])


def row_overlap(first: Tensor, second: Tensor, rank: int) -> float:
    """The overlap of the `rank` leading right singular vectors of two wide matrices `[k, n]`, by their products alone.

    Directions whose singular value is below a millionth of the largest are noise, and left out.

    >>> a, b = gaussian(4, 50, seed=0), gaussian(4, 50, seed=1)
    >>> exact_one = overlap(exact(a, 2).v, exact(b, 2).v)
    >>> abs(row_overlap(a, b, 2) - exact_one) < 1e-6
    True
    """
    a, b = first.to(torch.float64), second.to(torch.float64)
    sides: list[Tensor] = []
    for rows in (a, b):
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        kept = values[-rank:] > 1e-12 * values[-1]
        sides.append(vectors[:, -rank:][:, kept] / values[-rank:][kept].sqrt())
    shared = sides[0].T @ (a @ b.T) @ sides[1]
    return float(shared.square().sum()) / max(1, min(shared.shape))


def completed(basis: Tensor, count: int, seed: int) -> Tensor:
    """`basis` (orthonormal columns, `[n, k]`) with random ones beyond it until there are `count`, all orthonormal.

    Beyond `n` there is no room: what follows are random columns of length one.
    """
    n, k = basis.shape
    if count <= k:
        return basis[:, :count]
    more = gaussian(n, count - k, seed, basis.device).to(basis.dtype)
    room = min(n, count) - k
    if room > 0:
        free = more[:, :room]
        for _ in range(2):  # twice is enough (Giraud, Langou and Rozložník, 2005)
            free = free - basis @ (basis.T @ free)
        basis = torch.cat([basis, orthonormal(free)], 1)
    rest = more[:, max(room, 0) :]
    return torch.cat([basis, rest / rest.norm(dim=0, keepdim=True)], 1) if rest.shape[1] else basis


def _signed(u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype) -> Triples:
    """The `rank` leading triples, each with the sign that makes the entry of `v` of largest magnitude positive."""
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    peak = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(vh.dtype)
    return Triples((u * sign.T).to(dtype), s.to(dtype), (vh * sign).T.contiguous().to(dtype))
