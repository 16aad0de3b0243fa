"""The orthogonal transforms, against their definition."""

from __future__ import annotations

import pytest
import torch

from slimtune.errors import ShapeError
from slimtune.linalg import hadamard as hadamard_module
from slimtune.linalg.hadamard import factors, hadamard, matrix, transform


@pytest.mark.parametrize("n", [1, 2, 8, 12, 28, 36, 52, 100, 164, 192, 244, 344, 576, 1536])
def test_hadamard_matrices_are_signs_with_orthogonal_rows(n: int) -> None:
    h = hadamard(n)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("q", [3, 5, 9, 13, 25, 27, 49, 81, 125, 243, 343])
def test_paleys_core_is_that_of_a_field(q: int) -> None:
    """Q Qᵀ = q I - J holds only where χ is the character of a field; for a prime, of the numbers modulo it."""
    core, ones = hadamard_module._jacobsthal(q), torch.ones(q, q, dtype=torch.float64)
    assert torch.equal(core @ core.T, q * torch.eye(q, dtype=torch.float64) - ones)
    assert torch.equal(core, core.T if q % 4 == 1 else -core.T)
    if q in (3, 5, 13):
        squares = {i * i % q for i in range(1, q)}
        assert [int(x) for x in core[:, 0]] == [0, *(1 if i in squares else -1 for i in range(1, q))]


def test_orders_that_primes_give_are_those_that_primes_gave() -> None:
    """Folders hold what was turned by them: 28 is 2(13 + 1), as before powers of primes were known."""
    found = {n: hadamard_module._paley(n) for n in range(4, 257, 4)}
    assert found[28] == 13 and found[4] == 3 and found[8] == 7
    powers = {n for n, q in found.items() if q and not all(q % d for d in range(2, q))}
    assert powers == {52, 100, 244}


def test_llama_30b_turns_by_signs_alone() -> None:
    assert [len(f) for f in factors(6656)] == [52, 16, 8]
    assert float((factors(6656)[0].abs() - 52**-0.5).abs().max()) < 1e-12


def test_a_width_without_one_is_refused() -> None:
    with pytest.raises(ShapeError, match="no Hadamard matrix"):
        hadamard(10)


@pytest.mark.parametrize("n", [1, 2, 7, 24, 37, 40, 74, 100, 576])
def test_the_transform_is_orthogonal_and_equals_its_matrix(n: int) -> None:
    x, m = torch.randn(3, 2, n, dtype=torch.float64), matrix(n)
    torch.testing.assert_close(m @ m.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(transform(x), x @ m.T)
    torch.testing.assert_close(transform(transform(x), inverse=True), x)
    torch.testing.assert_close(transform(x.movedim(-1, 0), 0), transform(x).movedim(-1, 0))


def test_wide_transforms_are_small_factors() -> None:
    assert max(len(f) for f in factors(1536)) <= 64 and len(factors(1536)) > 1
    torch.testing.assert_close(matrix(1536).abs().max(), torch.tensor(1536.0, dtype=torch.float64).rsqrt())


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("n", [74, 100, 576, 1536, 2048])
def test_in_bfloat16_it_is_the_same_transform(monkeypatch: pytest.MonkeyPatch, n: int, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    hadamard_module._products.cache_clear()
    x = torch.randn(5, n).to(torch.bfloat16)
    for inverse in (False, True):
        wanted = transform(x.double(), inverse=inverse)
        assert float((transform(x, inverse=inverse) - wanted).norm() / wanted.norm()) < 0.005
    hadamard_module._products.cache_clear()
