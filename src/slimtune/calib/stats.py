"""What calibration can collect about a layer's inputs. A method names what it needs; nothing else is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from slimtune.linalg.hessian import CrossMoment, SecondMoment


class Statistic(Protocol):
    """A running statistic of a layer's input."""

    def update(self, x: Tensor, dense: Tensor) -> None:
        """Add tokens, `[..., in_features]`: as the layer gets them, and as the dense model would have them there."""

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

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add tokens, `[..., in_features]`; those of the dense model do not matter."""
        x = x.reshape(-1, x.shape[-1])
        self._sum += x.sum(0, dtype=torch.float64)
        self._count += len(x)

    def result(self) -> Tensor:
        """The mean over all tokens so far, float32 `[in_features]`."""
        return (self._sum / max(self._count, 1)).float()


class _Hessian:
    def __init__(self, features: int, device: torch.device) -> None:
        self._moment = SecondMoment(features, device=device)

    def update(self, x: Tensor, dense: Tensor) -> None:
        self._moment.update(x)

    def result(self) -> Tensor:
        return self._moment.result()


class _Drift:
    def __init__(self, features: int, device: torch.device) -> None:
        self._moment = CrossMoment(features, device=device)

    def update(self, x: Tensor, dense: Tensor) -> None:
        self._moment.update(x, dense.to(torch.float32) - x.to(torch.float32))

    def result(self) -> Tensor:
        return self._moment.result()


DRIFT = "drift"
"""The statistic for which the dense model runs beside the quantized one."""

STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {
    "hessian": _Hessian,
    "mean": Mean,
    DRIFT: _Drift,
}
"""Constructors by name, `(in_features, device) -> Statistic`; for inputs `X`, and `Z` in the dense model: `hessian` is
`XᵀX / n`, `drift` is `(Z - X)ᵀX / n`, both float32 `[in, in]`;
`mean` is that of `X`, float32 `[in]`."""
