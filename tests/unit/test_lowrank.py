"""Truncated singular value decompositions, plain and weighted, against numpy's."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import slimtune.linalg.lowrank
from slimtune.linalg.lowrank import Factors, low_rank

SHAPES = [(12, 30), (30, 12), (16, 16)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * torch.rand(shape[1], dtype=torch.float64)


def hessian(columns: int) -> Tensor:
    x = torch.randn(3 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    return x.T @ x / len(x)


def damped(h: Tensor, damp: float = 0.01) -> Tensor:
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def loss(m: Tensor, factors: Factors, h: Tensor) -> float:
    off = m - factors.b @ factors.a
    return float(((off @ h) * off).sum())


def truncated(m: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@each_shape
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_without_weights_it_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    m = matrix(shape)
    a, b = low_rank(m, rank)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    np.testing.assert_allclose((b @ a).numpy(), truncated(m.numpy(), rank), atol=1e-10)


@each_shape
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_weighted_it_is_the_truncated_svd_in_the_root_of_the_hessian(shape: tuple[int, int], rank: int) -> None:
    m, h = matrix(shape), hessian(shape[1])
    values, vectors = np.linalg.eigh(damped(h).numpy())
    root = (vectors * np.sqrt(values)) @ vectors.T
    best = truncated(m.numpy() @ root, rank) @ np.linalg.inv(root)
    a, b = low_rank(m, rank, h)
    np.testing.assert_allclose((b @ a).numpy(), best, atol=1e-9)
    # No other factors of this rank are better: not the plain ones, nor any near these.
    least = loss(m, Factors(a, b), damped(h))
    assert least < loss(m, low_rank(m, rank), damped(h))
    for _ in range(5):
        near = Factors(a + 1e-3 * torch.randn_like(a), b + 1e-3 * torch.randn_like(b))
        assert least < loss(m, near, damped(h))


@each_shape
def test_an_even_hessian_is_none(shape: tuple[int, int]) -> None:
    m = matrix(shape)
    weighted, plain = low_rank(m, 4, 3.0 * torch.eye(shape[1])), low_rank(m, 4)
    torch.testing.assert_close(weighted.b @ weighted.a, plain.b @ plain.a)


@each_shape
@pytest.mark.parametrize("weighted", [False, True])
def test_a_full_rank_leaves_nothing(shape: tuple[int, int], weighted: bool) -> None:
    m = matrix(shape)
    for rank in (12, 16, 40):
        a, b = low_rank(m, rank, hessian(shape[1]) if weighted else None)
        if rank >= min(shape):
            torch.testing.assert_close(b @ a, m, rtol=0, atol=1e-10)
        assert len(a) == min(rank, *shape)


@each_shape
@pytest.mark.parametrize("weighted", [False, True])
def test_a_higher_rank_loses_less_and_begins_with_the_lower(shape: tuple[int, int], weighted: bool) -> None:
    m, h = matrix(shape), hessian(shape[1])
    losses = [loss(m, Factors(torch.zeros(1, shape[1]).double(), torch.zeros(shape[0], 1).double()), damped(h))]
    for rank in range(1, 12):
        losses.append(loss(m, low_rank(m, rank, h), damped(h)))
    assert all(a > b for a, b in pairwise(losses))
    (a, b), (first, second) = low_rank(m, 9), low_rank(m, 4)
    torch.testing.assert_close(b[:, :4] @ a[:4], second @ first)


def test_factors_are_of_one_size_and_in_order() -> None:
    a, b = low_rank(matrix((20, 30)), 6, hessian(30))
    torch.testing.assert_close(a @ a.T, b.T @ b)
    sizes = a.norm(dim=1)
    assert bool((sizes[:-1] >= sizes[1:]).all())
    torch.testing.assert_close(a @ a.T, torch.diag(sizes**2))


def test_a_singular_hessian_is_no_obstacle() -> None:
    m = matrix((10, 24))
    h = hessian(24)
    h[:, 3] = h[3, :] = 0
    a, b = low_rank(m, 24, h)
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    torch.testing.assert_close(b @ a, m)


@each_shape
def test_a_sketch_comes_close(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    m = torch.randn(10 * shape[0], 10 * shape[1])
    exact = low_rank(m, 8)
    monkeypatch.setattr(slimtune.linalg.lowrank, "EXACT", 8)
    state = torch.get_rng_state()
    sketch = low_rank(m, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(low_rank(m, 8), sketch, strict=True))
    best, found = (float((m - f.b @ f.a).square().sum()) for f in (exact, sketch))
    total = float(m.square().sum())
    assert best <= found * (1 + 1e-6) and total - found > 0.97 * (total - best)
