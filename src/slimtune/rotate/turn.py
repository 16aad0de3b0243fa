"""Orthogonal maps of vectors, `x -> x R`: what a rotation is made of, applied without building `R` where that is
possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from slimtune.kernels.dispatch import transform


@dataclass(frozen=True)
class Turn:
    """An orthogonal map of each of `heads` parts of a vector; the parts are `width` wide.

    One part turns by `x -> transform(signs * x)`, or by `x -> x @ matrix` where there are matrices. Where there is a
    `mirror` (a unit vector `m`), the reflection `y -> y - 2 (y·m) m` follows.

    Args:
        signs: ±1, float64 `[heads, width]`.
        matrix: orthogonal, float64 `[heads, width, width]`.
        mirror: float64 `[width]`.

    Example:
        >>> turn = hadamard_turn(12, generator=torch.Generator().manual_seed(0))
        >>> x = torch.randn(3, 12, dtype=torch.float64)
        >>> bool(torch.allclose(turn(turn(x), inverse=True), x)), bool(torch.allclose(turn(x).norm(), x.norm()))
        (True, True)
    """

    signs: Tensor
    matrix: Tensor | None = None
    mirror: Tensor | None = None

    @property
    def heads(self) -> int:
        """Parts of a vector that turn each on its own."""
        return self.signs.shape[0]

    @property
    def width(self) -> int:
        """The width of one part."""
        return self.signs.shape[1]

    @cached_property
    def signed(self) -> bool:
        """Whether any sign is not 1: online, a pass over the data is a sixth of the transform."""
        return not bool((self.signs == 1).all())

    def __call__(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """`x R` (`x Rᵀ` with `inverse`) for `x` `[..., heads * width]`, in the dtype of `x`."""
        parts = x.unflatten(-1, (self.heads, self.width))
        parts = self._back(parts) if inverse else self._forth(parts)
        return parts.flatten(-2)

    def _forth(self, x: Tensor) -> Tensor:
        if self.matrix is None:
            x = transform(x * self.signs.to(x) if self.signed else x)
        else:
            x = torch.einsum("...hn,hnm->...hm", x, self.matrix.to(x))
        return self._reflected(x)

    def _back(self, x: Tensor) -> Tensor:
        x = self._reflected(x)
        if self.matrix is None:
            x = transform(x, inverse=True)
            return x * self.signs.to(x) if self.signed else x
        return torch.einsum("...hn,hmn->...hm", x, self.matrix.to(x))

    def _reflected(self, x: Tensor) -> Tensor:
        if self.mirror is None:
            return x
        mirror = self.mirror.to(x)
        return x - 2 * (x @ mirror)[..., None] * mirror

    def like(self, x: Tensor) -> Turn:
        """The same turn with its signs in the dtype and on the device of `x`."""
        if self.signs.dtype == x.dtype and self.signs.device == x.device:
            return self
        return replace(self, signs=self.signs.to(x))

    def of(self, heads: Sequence[int]) -> Turn:
        """The turn of these of its parts."""
        chosen = list(heads)
        return replace(self, signs=self.signs[chosen], matrix=None if self.matrix is None else self.matrix[chosen])

    def repeated(self, times: int) -> Turn:
        """The turn of query heads that share their turn with their key-value head: `times` of them in a row."""
        matrix = None if self.matrix is None else self.matrix.repeat_interleave(times, 0)
        return replace(self, signs=self.signs.repeat_interleave(times, 0), matrix=matrix)


def hadamard_turn(width: int, *, heads: int = 1, generator: torch.Generator) -> Turn:
    """A Hadamard transform (of any width) behind random signs, other ones for each part."""
    bits = torch.randint(2, (heads, width), generator=generator, device=generator.device)
    return Turn((2 * bits - 1).to(torch.float64))


@lru_cache(maxsize=16)
def keys_turn(width: int) -> Turn:
    """R3, of each head's queries and keys. Its signs are always the same, and in no file: no weight has its inverse.

    Without signs, what all channels of a key have in common would add up in one.
    """
    with torch.inference_mode(False):  # it outlives the caller
        return hadamard_turn(width, generator=torch.Generator().manual_seed(0))


def orthogonal_turn(width: int, *, heads: int = 1, generator: torch.Generator) -> Turn:
    """Random orthogonal matrices, uniform over all of them: Q of the QR of a Gaussian, signs fixed by R's diagonal."""
    noise = torch.randn(heads, width, width, dtype=torch.float64, generator=generator, device=generator.device)
    return dense_turn(orthogonal(noise))


def dense_turn(matrix: Tensor) -> Turn:
    """The turn of given orthogonal matrices, `[heads, width, width]`."""
    return Turn(torch.ones(matrix.shape[:2], dtype=torch.float64, device=matrix.device), matrix.to(torch.float64))


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of each matrix `[..., n, n]`, unique: that of the QR whose R has a positive diagonal."""
    q, r = torch.linalg.qr(matrix)
    turned: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return turned


def level(turn: Turn) -> Turn:
    """`turn`, followed by the reflection after which a vector of equal entries is what it was.

    LayerNorm's mean is a product with that vector: a level turn commutes with subtracting it, so LayerNorm stays what
    it is, and nothing has to be centred.
    """
    ones = torch.full((turn.width,), turn.width**-0.5, dtype=torch.float64, device=turn.signs.device)
    off = replace(turn, mirror=None)(ones) - ones
    return replace(turn, mirror=off / off.norm()) if off.norm() > 1e-9 else turn
