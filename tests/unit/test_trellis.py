"""Trellis codes: the shortest path against all walks, and the ring of bits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from slimtune.linalg import trellis
from slimtune.linalg.packing import unpack
from slimtune.linalg.trellis import Encoder, Trellis, closed, decode, table, viterbi


def states_of(symbols: Tensor, order: int, bits: int) -> Tensor:
    """States of walks with the symbols `[steps + order - 1, n]`."""
    steps = len(symbols) - order + 1
    return sum(symbols[i : i + steps] << bits * i for i in range(order))  # type: ignore[return-value]


def tiny(length: int, bits: int) -> tuple[Tensor, Trellis]:
    numbers = torch.randn(1 << length, dtype=torch.float64)
    return numbers, Trellis.of(numbers, bits)


@pytest.mark.parametrize(("length", "bits", "steps"), [(2, 1, 5), (4, 2, 3), (3, 1, 7), (6, 3, 2), (4, 1, 6)])
def test_viterbi_finds_the_best_of_all_walks(length: int, bits: int, steps: int) -> None:
    numbers, walks = tiny(length, bits)
    order = length // bits
    x = torch.randn(steps, 6, dtype=torch.float64)
    every = torch.tensor(list(product(range(1 << bits), repeat=steps + order - 1))).T
    costs = (numbers[states_of(every, order, bits)][:, :, None] - x[:, None]).square().sum(0)  # [walks, sequences]
    best = every[:, costs.argmin(0)]
    assert torch.equal(viterbi(x, walks), best[:steps])
    assert torch.equal(viterbi(x, walks, width=3), best[:steps])


@pytest.mark.parametrize(("length", "bits", "steps"), [(2, 1, 5), (4, 2, 4), (3, 1, 7), (4, 1, 9)])
def test_viterbi_with_an_overlap_finds_the_best_of_all_rings_with_it(length: int, bits: int, steps: int) -> None:
    numbers, walks = tiny(length, bits)
    order = length // bits
    x = torch.randn(steps, 6, dtype=torch.float64)
    overlap = torch.randint(0, 1 << bits, (order - 1, 6))
    rings = torch.tensor(list(product(range(1 << bits), repeat=steps))).T
    states = states_of(torch.cat([rings, rings[: order - 1]]), order, bits)
    costs = (numbers[states][:, :, None] - x[:, None]).square().sum(0)
    costs[(rings[: order - 1, :, None] != overlap[:, None]).any(0)] = torch.inf
    assert torch.equal(viterbi(x, walks, overlap), rings[:, costs.argmin(0)])


def test_closed_walks_are_near_the_best_of_all_rings() -> None:
    numbers, walks = tiny(4, 2)
    x = torch.randn(6, 200, dtype=torch.float64)
    rings = torch.tensor(list(product(range(4), repeat=6))).T

    def costs(symbols: Tensor) -> Tensor:
        return numbers[states_of(torch.cat([symbols, symbols[:1]]), 2, 2)]

    best = (costs(rings)[:, :, None] - x[:, None]).square().sum(0).min(0).values
    got = (costs(closed(x, walks)) - x).square().sum(0)
    assert bool((got >= best - 1e-9).all())
    assert float(got.mean()) < 1.15 * float(best.mean())
    assert float((got < best + 1e-9).double().mean()) > 0.4


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 20, 51])
def test_codes_are_rings_of_bits_and_decode_by_windows(bits: int, count: int) -> None:
    codes = torch.randint(0, 256, (count, 32 * bits), dtype=torch.uint8)
    symbols = unpack(codes, bits, 256).long()
    stream = [(int(s) >> b) & 1 for s in symbols[0] for b in range(bits)]
    windows = [sum(stream[(t * bits + i) % len(stream)] << i for i in range(12)) for t in range(256)]
    got = decode(codes, bits, torch.float64)
    torch.testing.assert_close(got[0], table(bits)[windows] / trellis.SPREAD[bits])
    ring = torch.cat([symbols, symbols[:, :11]], 1).T
    states = states_of(ring[: 255 + 12 // bits], 12 // bits, bits)
    torch.testing.assert_close(got, table(bits)[states].T / trellis.SPREAD[bits])


@pytest.mark.parametrize(("bits", "random"), [(2, 0.0712), (3, 0.0190), (4, 0.0053)])
def test_distortion_on_normal_numbers(bits: int, random: float) -> None:
    """No worse than a table in random disorder has (as published), and less than the best scalar quantizer's."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    codes = Encoder(bits)(x)
    assert codes.dtype == torch.uint8 and codes.shape == (64, 32 * bits)
    got = float((decode(codes, bits, x.dtype) - x).square().mean())
    assert 2.0 ** (-2 * bits) < got < 1.02 * random


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_can_be_decoded_is_found_again(bits: int) -> None:
    codes = torch.randint(0, 256, (3, 32 * bits), dtype=torch.uint8)
    x = decode(codes, bits, torch.float64)
    assert torch.equal(Encoder(bits)(x), codes)


def test_sequences_do_not_depend_on_their_neighbours() -> None:
    x = torch.randn(50, 256)
    encoder = Encoder(2)
    codes = encoder(x)
    torch.testing.assert_close(decode(encoder(x[7:9]), 2, x.dtype), decode(codes[7:9], 2, x.dtype))
    assert torch.equal(encoder(x), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_table_is_a_permutation_that_tells_neighbours_apart(bits: int) -> None:
    numbers = table(bits)
    assert len(numbers.unique()) == 4096 and abs(float(numbers.sum())) < 1e-9
    rank = numbers.argsort().argsort()
    fan = 1 << bits
    state = torch.randint(0, 1 << (12 - bits), (20,))
    for group in (state[:, None] + (torch.arange(fan) << (12 - bits)), (state[:, None] << bits) + torch.arange(fan)):
        parts = (rank[group] >> (12 - bits)).sort(1).values
        assert torch.equal(parts, torch.arange(fan).expand(20, fan))
