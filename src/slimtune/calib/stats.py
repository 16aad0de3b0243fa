"""What calibration can collect about a layer's inputs. A method names what it needs; nothing else is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from slimtune.linalg.hessian import SecondMoment


class Statistic(Protocol):
    """A running statistic of a layer's input."""

    def update(self, x: Tensor) -> None:
        """Add tokens, `[..., in_features]`."""

    def result(self) -> Tensor:
        """The statistic over all tokens so far."""


class Mean:
    """The mean of each feature, summed in float64.

    >>> mean = Mean(2, torch.device("cpu"))
    >>> mean.update(torch.tensor([[1.0, 4.0], [3.0, 0.0]]))
    >>> mean.result()
    tensor([2., 2.])
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._count = 0

    def update(self, x: Tensor) -> None:
        """Add tokens, `[..., in_features]`."""
        x = x.reshape(-1, x.shape[-1])
        self._sum += x.sum(0, dtype=torch.float64)
        self._count += len(x)

    def result(self) -> Tensor:
        """The mean over all tokens so far, float32 `[in_features]`."""
        return (self._sum / max(self._count, 1)).float()


def _hessian(features: int, device: torch.device) -> Statistic:
    return SecondMoment(features, device=device)


STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {"hessian": _hessian, "mean": Mean}
"""Constructors by name, `(in_features, device) -> Statistic`. `hessian` is `XᵀX / n`, float32 `[in, in]`; `mean` is
float32 `[in]`."""
