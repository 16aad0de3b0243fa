"""Activations that a backward pass makes again instead of keeping them.

What a norm or a gate makes is read by linears, which would keep it for the gradients of their adapters. The norm and
the gate keep their own inputs anyway, and make it again in one pass over memory. So their outputs say how that is done,
and a function that reads one may save what it is made of (shared with the norm or gate) in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor

_MARK = "_slimtune_remake"


class Remake(NamedTuple):
    """How a tensor is made again, bit for bit: `make(*of)`."""

    make: Callable[..., Tensor]
    of: tuple[Tensor, ...]
    version: int


def remade(y: Tensor, make: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """`y`, which is `make(*of)`, and knows it from here on. `of` are tensors that are kept as long as its graph is."""
    if y.requires_grad:
        setattr(y, _MARK, Remake(make, tuple(t.detach() for t in of), y._version))
    return y


def remake_of(x: Tensor) -> Remake | None:
    """How `x` is made again, where it is what `remade` gave back, and unchanged since.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = remade(x * 2, lambda x: x * 2, x)
    >>> remake = remake_of(y)
    >>> remake.make(*remake.of), remake_of(y.view(2)), remake_of(y.add_(1))
    (tensor([2., 2.]), None, None)
    """
    found = cast("Remake | None", getattr(x, _MARK, None))
    return found if found is not None and found.version == x._version else None
