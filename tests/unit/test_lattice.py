"""E8P: the codebook, and its encoder against a search of all points."""

from __future__ import annotations

import pytest
import torch

from slimtune.linalg.lattice import RESIDUAL, decode, encode, nearest, points


def test_points_are_distinct_and_of_the_lattice() -> None:
    p = points()
    assert p.shape == (65536, 8) and len(p.unique(dim=0)) == 65536
    shift = 0.25 - 0.5 * (torch.arange(65536) >> 15)[:, None]
    t = p - shift
    assert bool(((t - 0.5) == (t - 0.5).round()).all()) and bool((t.sum(1) % 2 == 0).all())
    assert float(t.square().sum(1).max()) == 12


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_the_encoder_finds_the_nearest_of_all_points(spread: float) -> None:
    x = torch.randn(300, 8, dtype=torch.float64) * spread
    got = points()[nearest(x).long()]
    wanted = torch.cdist(x, points()).square().min(1).values
    torch.testing.assert_close((got - x).square().sum(1), wanted)


def test_distortion_on_normal_data() -> None:
    x = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    two, four = (float((decode(encode(x * s, b), x.dtype) / s - x).square().mean()) for s, b in ((1.03, 2), (0.9, 4)))
    assert abs(two / 0.0919 - 1) < 0.02
    assert four < 0.0095  # a uniform grid of 16 levels has 0.0115


def test_four_bits_are_the_nearest_and_the_nearest_of_the_rest() -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    first = points()[nearest(x).long()]
    rest = points()[nearest((x - first) * RESIDUAL).long()]
    torch.testing.assert_close(decode(encode(x, 4), x.dtype), first + rest / RESIDUAL)
