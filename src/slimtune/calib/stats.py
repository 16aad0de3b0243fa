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


def _hessian(features: int, device: torch.device) -> Statistic:
    return SecondMoment(features, device=device)


STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {"hessian": _hessian}
"""Constructors by name, `(in_features, device) -> Statistic`. `hessian` is `XᵀX / n`, float32 `[in, in]`."""
