"""What an optimizer holds of a parameter, when that is cut.

What has the parameter's shape loses the same rows or columns. Some optimizers know better how their state lies: they
cut it themselves. Of any other, a parameter whose state is more than that (sums over the dimension that is cut, codes
in blocks) begins anew, as at the first step.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class CutsState(Protocol):
    """An optimizer that knows how its state lies."""

    def cut_(self, parameter: Tensor, dim: int, indices: Tensor) -> None:
        """Keep these indices of what is held along dimension `dim` of `parameter`, which was cut just now."""


def cut_state_(
    optimizer: torch.optim.Optimizer, parameter: Tensor, shape: torch.Size, dim: int, indices: Tensor
) -> None:
    """Keep `indices` of the state of `parameter`, which had the shape `shape` and was cut along `dim`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 3))
        >>> adam, whole = torch.optim.Adam([weight]), weight.shape
        >>> weight.sum().backward()
        >>> adam.step()
        >>> weight.data, weight.grad = weight.data[:2], None
        >>> cut_state_(adam, weight, whole, 0, torch.tensor([0, 1]))
        >>> adam.state[weight]["exp_avg"].shape
        torch.Size([2, 3])
    """
    inner = vars(optimizer).get("optimizer", optimizer)  # inside accelerate's
    if isinstance(inner, CutsState):
        inner.cut_(parameter, dim, indices)
        return
    state: MutableMapping[str, Any] = inner.state.get(parameter, {})
    whole = {name for name, value in state.items() if isinstance(value, Tensor) and value.shape == shape}
    if not all(name in whole or _single(value) for name, value in state.items()):
        state.clear()
        return
    for name in whole:
        state[name] = state[name].index_select(dim, indices.to(state[name].device))


def _single(value: object) -> bool:
    """Whether it is one number, or none: a count of steps, say."""
    return value.numel() == 1 if isinstance(value, Tensor) else value is None or isinstance(value, int | float)
