"""E8P and the codes of what it leaves, against searches of all points."""

from __future__ import annotations

import pytest
import torch

from slimtune.linalg.lattice import RESIDUAL, SPREAD, decode, encode, nearest, points, roots


def test_points_are_distinct_and_of_the_lattice() -> None:
    p = points()
    assert p.shape == (65536, 8) and len(p.unique(dim=0)) == 65536
    shift = 0.25 - 0.5 * (torch.arange(65536) >> 15)[:, None]
    t = p - shift
    assert bool(((t - 0.5) == (t - 0.5).round()).all()) and bool((t.sum(1) % 2 == 0).all())
    assert float(t.square().sum(1).max()) == 12


def test_roots_are_distinct_and_of_the_lattice() -> None:
    r = roots()
    assert r.shape == (256, 8) and len(r.unique(dim=0)) == 256
    whole, half = (r == r.round()).all(1), (r - 0.5 == (r - 0.5).round()).all(1)
    assert bool((whole | half).all()) and bool((r.sum(1) % 2 == 0).all())


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_the_encoder_finds_the_nearest_of_all_points(spread: float) -> None:
    x = torch.randn(600, 8, dtype=torch.float64) * spread
    got = points()[nearest(x)]
    wanted = torch.cdist(x, points()).square().min(1).values
    torch.testing.assert_close((got - x).square().sum(1), wanted)


def test_ties_and_zeros_are_points_too() -> None:
    x = torch.cat([torch.zeros(1, 8), torch.eye(8), torch.full((1, 8), 0.25), torch.full((1, 8), -0.25)]).double()
    wanted = torch.cdist(x, points()).square().min(1).values
    torch.testing.assert_close((points()[nearest(x)] - x).square().sum(1), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_the_nearest_and_the_nearest_of_the_rest(bits: int) -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    wanted = points()[torch.cdist(x * SPREAD[bits], points()).argmin(1)]
    if bits > 2:
        rest = (x * SPREAD[bits] - wanted) * RESIDUAL[bits]
        table = roots() if bits == 3 else points()
        wanted = wanted + table[torch.cdist(rest, table).argmin(1)] / RESIDUAL[bits]
    codes = encode(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (50, bits)
    torch.testing.assert_close(decode(codes, x.dtype), wanted / SPREAD[bits])


@pytest.mark.parametrize(("bits", "wanted"), [(2, 0.0919), (3, 0.0295), (4, 0.0084)])
def test_distortion_on_normal_numbers(bits: int, wanted: float) -> None:
    x = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    assert abs(float((decode(encode(x, bits), x.dtype) - x).square().mean()) / wanted - 1) < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_constants_are_the_best_in_their_neighbourhood(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.linalg import lattice

    x = torch.randn(2500, 8, generator=torch.Generator().manual_seed(1))

    def distortion() -> float:
        lattice.tables.cache_clear()
        return float((decode(encode(x, bits), x.dtype) - x).square().mean())

    best = distortion()
    for table in (SPREAD, RESIDUAL):
        for factor in (0.9, 1.1):
            if bits in table:
                monkeypatch.setitem(table, bits, table[bits] * factor)
                assert distortion() > best
                monkeypatch.undo()
    lattice.tables.cache_clear()
