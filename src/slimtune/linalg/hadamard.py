"""Orthogonal transforms that spread every coordinate over all others, for any width, as a few small matrix products.

The matrix of a width is a Kronecker product of small orthogonal factors. Where the width allows, all of them are
Hadamard matrices (entries ±1, divided by the root of the order): Sylvester's for powers of two, Paley's for the rest.

* Paley I: order `q + 1` for `q ≡ 3 (mod 4)`; Paley II: order `2(q + 1)` for `q ≡ 1 (mod 4)`; `q` a prime or a power
  of one. Source: R. Paley, "On orthogonal matrices", 1933.
* An odd prime of the width that no Paley order takes up falls back to Hartley's matrix, `cos(2πij/p) + sin(2πij/p)`
  over the root of `p`: orthogonal and symmetric for every `p`, with entries at most `√2` times those of a Hadamard
  matrix. A width that is a large prime is one dense factor.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce

import torch
from torch import Tensor

from slimtune.errors import ShapeError
from slimtune.linalg.constant import constant

WIDEST = 64
"""Factors are multiplied together up to this order: fewer passes over the data, while products still cost little.
Part of the definition of every matrix: what is stored in a basis depends on it."""

SMALL = 8
"""The same where multiplications cost as much as passes."""

HALVES = (640, 128)
"""The same for a product in bfloat16 on a CPU with AMX, and on one without. No part of the definition: neighbours only.

Measured on one core, 512 vectors, with AMX: 1536 wide 0.85 ms where three factors take 3.7 and the dense matrix 3.9,
2048 wide 1.2 (4.1), 8192 wide 6.2 (10.9), 576 wide, as one, 0.43 (0.84). Without: 2.9 (4.4), 4.7 (5.6); wider ones
take longer than what they replace."""

LARGEST = 256
"""Orders of Paley that transforms use: beyond, Hartley's matrix of the odd prime is cheaper and nearly as even."""


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix of order `n`: float64 `[n, n]` of ±1 with `H Hᵀ = n I`.

    Raises `ShapeError` where Sylvester's and Paley's constructions give none.

    >>> hadamard(12).abs().unique(), bool((hadamard(12) @ hadamard(12).T == 12 * torch.eye(12)).all())
    (tensor([1.], dtype=torch.float64), True)
    """
    odd, orders = _orders(n, n)
    if odd:
        raise ShapeError("no Hadamard matrix is known here for this width", got=n, remedy="use `matrix`: any width")
    return reduce(torch.kron, map(_factor, orders), torch.ones(1, 1, dtype=torch.float64))


def factors(n: int) -> tuple[Tensor, ...]:
    """Orthogonal matrices, float64, whose Kronecker product in this order is the transform of width `n`.

    >>> [len(factor) for factor in factors(576)], [len(factor) for factor in factors(2 * 37)]
    ([48, 12], [37, 2])
    """
    with torch.inference_mode(False):
        return _factors(n)


def matrix(n: int) -> Tensor:
    """The transform of width `n` as one dense orthogonal matrix, float64 `[n, n]`. For tests and small widths."""
    return reduce(torch.kron, factors(n))


def transform(x: Tensor, dim: int = -1, *, inverse: bool = False) -> Tensor:
    """Multiply every vector along `dim` by `matrix(n)`, or by its inverse, in the dtype of `x`.

    Costs `n` times the sum of the factors' orders for each vector, where the dense product costs `n²`.

    >>> x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> back = transform(transform(x), inverse=True)
    >>> bool(torch.allclose(transform(x), x @ matrix(12).T)), bool(torch.allclose(back, x))
    (True, True)
    """
    moved = x.movedim(dim, -1)
    n = moved.shape[-1]
    flat = moved.reshape(-1, n)
    right = n
    for factor in _products(n, x.dtype, x.device):
        right //= len(factor)
        f = factor.T if inverse else factor
        if right == 1:
            flat = (flat.reshape(-1, len(f)) @ f.T).view(-1, n)
        else:
            flat = (f @ flat.reshape(-1, len(f), right)).view(-1, n)
    return flat.view(moved.shape).movedim(-1, dim)


@lru_cache(maxsize=256)
def small_factors(n: int) -> tuple[Tensor, ...]:
    """The same in factors that are products of few: more of them, and fewer multiplications in all.

    >>> [len(factor) for factor in small_factors(576)], [len(factor) for factor in small_factors(1536)]
    ([4, 12, 12], [8, 2, 12, 8])
    """
    with torch.inference_mode(False):
        made: list[Tensor] = []
        for order in (order for parts in _parts(n) for order in parts):
            factor = _factor(order) / math.sqrt(order)
            if made and len(made[-1]) * order <= SMALL:
                factor = torch.kron(made.pop(), factor)
            made.append(factor)
        return tuple(made)


@lru_cache(maxsize=256)
def _factors(n: int) -> tuple[Tensor, ...]:
    return tuple(reduce(torch.kron, map(_factor, parts)) / math.sqrt(math.prod(parts)) for parts in _parts(n))


def _parts(n: int) -> list[tuple[int, ...]]:
    """The orders that each factor is the product of."""
    orders: list[tuple[int, tuple[int, ...]]] = [(order, (order,)) for order in _orders(n, LARGEST)[1]]
    while len(orders) > 1:
        orders.sort()
        (a, small), (b, smallish), *rest = orders
        if a * b > WIDEST:
            break
        orders = [*rest, (a * b, small + smallish)]
    return [parts for _, parts in sorted(orders)[::-1]]


@constant
def _products(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The factors as a product in `dtype` takes them: the last ones as one where that is faster."""
    made, widest = list(factors(n)), 0
    if dtype == torch.bfloat16 and device.type == "cpu":
        widest = HALVES[0 if torch.cpu.get_capabilities().get("amx_bf16") else 1]
    with torch.inference_mode(False):
        while len(made) > 1 and len(made[-2]) * len(made[-1]) <= widest:
            made[-2:] = [torch.kron(*made[-2:])]
        return tuple(factor.to(device=device, dtype=dtype).contiguous() for factor in made)


@lru_cache(maxsize=1024)
def _orders(n: int, largest: int) -> tuple[int, tuple[int, ...]]:
    """The best way to write `n` as a product of orders, Paley's at most `largest`: how many of them are odd primes (as
    few as can be), and the orders (their sum as small as can be)."""
    if n < 1:
        raise ShapeError("no transform has this width", got=n, wanted="at least 1")
    if n == 1:
        return 0, (1,)
    ways = []
    for order in range(2, n + 1):
        if n % order == 0 and (_prime(order) or (order <= largest and _paley(order))):
            odd, rest = _orders(n // order, largest)
            ways.append((odd + order % 2, sum(rest) + order, tuple(sorted((order, *rest)))))
    odd, _, orders = min(ways)
    return odd, tuple(order for order in orders if order > 1)


def _factor(order: int) -> Tensor:
    """A matrix with `F Fᵀ = order * I`: Hadamard's of order 1 or 2, Paley's, or Hartley's for an odd prime."""
    if q := _paley(order):
        return _paley_one(q) if q == order - 1 else _paley_two(q)
    index = torch.arange(order, dtype=torch.float64, device="cpu")
    angle = torch.outer(index, index).remainder_(order) * (2 * math.pi / order)
    hartley = angle.cos() + angle.sin()
    return hartley.round() if order <= 2 else hartley


def _paley(order: int) -> int:
    """The prime power that gives a Paley matrix of this order, or 0; a prime where there is one (28 is 2(13 + 1))."""
    ways = [order - 1] * (order % 4 == 0) + [order // 2 - 1] * (order % 4 == 0 and (order // 2 - 1) % 4 == 1)
    return next((q for known in (_prime, _prime_of) for q in ways if q > 2 and known(q)), 0)


def _jacobsthal(q: int) -> Tensor:
    """`Q[i, j] = χ(i - j)` of the field of `q` elements: 1 where the difference is a square, -1 where it is not, 0 on
    the diagonal. An element is a number whose digits, in base of the field's prime, are a polynomial's coefficients."""
    p = _prime_of(q)
    powers = _powers(q, p)
    character = -torch.ones(q, dtype=torch.float64, device="cpu")
    character[torch.tensor(powers[::2], device="cpu")] = 1
    character[0] = 0
    places = p ** torch.arange(round(math.log(q, p)), device="cpu")
    digits = torch.arange(q, device="cpu")[:, None] // places % p
    return character[((digits[:, None] - digits[None, :]) % p * places).sum(-1)]


def _powers(q: int, p: int) -> list[int]:
    """1, x, x², ... modulo the first polynomial for which that is all of the field of `q` elements but 0."""
    for modulus in range(q):  # the coefficients of x^k, as x^(k-1), ..., 1
        element, found = 1, list[int]()
        while element and (not found or element != 1) and len(found) < q:
            found.append(element)
            top, rest = divmod(element, q // p)
            digits = ((rest * p // p**i + top * (modulus // p**i)) % p for i in range(round(math.log(q, p))))
            element = sum(digit * p**i for i, digit in enumerate(digits))
        if element == 1 and len(found) == q - 1:
            return found
    raise AssertionError(f"a field of {q} elements has a generator")


def _bordered(q: int, sign: int) -> Tensor:
    """`[[0, 1ᵀ], [±1, Q]]`, a conference matrix of order `q + 1`."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64, device="cpu")
    conference[1:, 0] = sign
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    return conference


def _paley_one(q: int) -> Tensor:
    return _bordered(q, -1) + torch.eye(q + 1, dtype=torch.float64, device="cpu")


def _paley_two(q: int) -> Tensor:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    return torch.kron(_bordered(q, 1), two) + torch.kron(torch.eye(q + 1, dtype=torch.float64, device="cpu"), turned)


def _prime_of(q: int) -> int:
    """The odd prime that `q` is a power of, or 0."""
    p = next((d for d in range(3, math.isqrt(max(q, 0)) + 1, 2) if q % d == 0), q)
    while q > 1 and q % p == 0:
        q //= p
    return p if q == 1 and p > 2 and p % 2 else 0


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
