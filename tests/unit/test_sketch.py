"""Singular triples from products with thin matrices, against a full SVD in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.linalg.sketch import (
    Triples,
    completed,
    exact,
    from_left,
    from_right,
    gaussian,
    one_pass,
    orthonormal,
    overlap,
)


def of_rank(rank: int, rows: int = 30, columns: int = 50) -> Tensor:
    """A float64 matrix of exactly this rank, whose singular values are well apart."""
    u, v = (orthonormal(torch.randn(n, rank, dtype=torch.float64)) for n in (rows, columns))
    return (u * torch.logspace(0, -2, rank, dtype=torch.float64)) @ v.T


def close(got: Triples, wanted: Triples, tolerance: float = 1e-9) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (12, 12)])
@pytest.mark.parametrize("rank", [1, 5])
def test_every_way_equals_the_svd_of_a_matrix_of_low_rank(shape: tuple[int, int], rank: int) -> None:
    g, out, width = of_rank(rank, *shape), *shape
    omega, psi = gaussian(width, 8, 0).double(), gaussian(min(16, out), out, 1).double()
    wanted = exact(g, rank)
    torch.testing.assert_close((wanted.u * wanted.s) @ wanted.v.T, g)
    close(one_pass(g @ omega, psi @ g, psi, rank), wanted)
    q = orthonormal(g @ omega)
    close(from_left(q, q.T @ g, rank), wanted)
    p = orthonormal(g.T @ gaussian(out, 8, 2).double())
    close(from_right(g @ p, p, rank), wanted)


def test_signs_are_fixed_by_the_largest_entry_of_v() -> None:
    u, s, v = exact(of_rank(6), 6)
    largest = v.gather(0, v.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    flipped = exact(-of_rank(6), 6)
    assert bool((flipped.v.gather(0, flipped.v.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close((u * s).T @ (u * s), torch.diag(s**2))


def test_more_passes_are_nearer() -> None:
    """On a matrix of full rank with a slow fall: each half of a power iteration captures more."""
    g = of_rank(30) + 0.02 * torch.randn(30, 50, dtype=torch.float64)
    best = exact(g, 4).s.square().sum()
    omega, psi = gaussian(50, 6, 0).double(), gaussian(12, 30, 1).double()

    def share(triples: Triples) -> float:
        return float((triples.u.T @ g @ triples.v).square().sum() / best)

    q = orthonormal(g @ omega)
    p = orthonormal(g.T @ q)
    again = orthonormal(g @ p)
    one = share(one_pass(g @ omega, psi @ g, psi, 4))
    two, four = share(from_left(q, q.T @ g, 4)), share(from_left(again, again.T @ g, 4))
    assert one < two < four <= 1 + 1e-12
    assert four > 0.97


def test_random_numbers_come_back_from_their_seed() -> None:
    assert torch.equal(gaussian(5, 7, 3), gaussian(5, 7, 3))
    assert not torch.equal(gaussian(5, 7, 3), gaussian(5, 7, 4))
    state = torch.get_rng_state()
    gaussian(5, 7, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_overlap_is_one_of_the_same_space_and_zero_of_another() -> None:
    q = orthonormal(torch.randn(10, 6, dtype=torch.float64))
    turn = orthonormal(torch.randn(3, 3, dtype=torch.float64))
    assert overlap(q[:, :3], q[:, :3] @ turn) == pytest.approx(1)
    assert overlap(q[:, :3], q[:, 3:]) == pytest.approx(0)
    assert overlap(q[:, :2], q[:, 1:3]) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [2, 3, 7, 10, 13])
def test_completed_columns_are_orthonormal_while_there_is_room(count: int) -> None:
    basis = orthonormal(torch.randn(10, 3, dtype=torch.float64))
    full = completed(basis, count, seed=0)
    assert full.shape == (10, count)
    assert torch.equal(full[:, : min(count, 3)], basis[:, :count])
    inside = full[:, :10]
    torch.testing.assert_close(inside.T @ inside, torch.eye(inside.shape[1], dtype=torch.float64))
    torch.testing.assert_close(full.norm(dim=0), torch.ones(count, dtype=torch.float64))
