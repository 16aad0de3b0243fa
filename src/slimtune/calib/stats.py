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

STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {"hessian": _Hessian, DRIFT: _Drift}
"""Constructors by name, `(in_features, device) -> Statistic`; for inputs `X`, and `Z` in the dense model: `hessian` is
`XᵀX / n`, `drift` is `(Z - X)ᵀX / n`, both float32 `[in, in]`."""
