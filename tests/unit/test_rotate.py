"""A rotated model computes what the model computed, in every family, and more exactly the more digits there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pico import PICO, logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.rotate.fuse import RotateFacts, rotate_
from slimtune.rotate.options import Rotation

PLAIN = Rotation()
every_pico = pytest.mark.parametrize("family", PICO)


class Exact(TorchFunctionMode):
    """Where a model asks for float32 (norms, softmax) it gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*wide, **named)


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def rotated(
    family: str, dtype: torch.dtype = torch.float64, rotation: Rotation = PLAIN, **overrides: Any
) -> tuple[float, RotateFacts]:
    """How far a rotation takes the logits of a pico model (with images, where it sees) from what they were."""
    model = pico_model(family, dtype=dtype, **overrides)
    inputs = pico_inputs(model)
    with Exact() if dtype == torch.float64 else nullcontext():
        before = logits(model, inputs)
        facts = rotate_(model, bind(model), rotation)
        return difference(logits(model, inputs), before), facts


@every_pico
@pytest.mark.parametrize("online", [(), ("r4",)])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_logits_are_the_same_in_float64(family: str, kind: str, online: tuple[str, ...]) -> None:
    error, facts = rotated(family, rotation=Rotation(kind=kind, seed=3, online=online))
    assert error < 1e-10
    assert facts.logit_error < 1e-10


@every_pico
def test_the_error_shrinks_with_the_digits(family: str) -> None:
    errors = [rotated(family, dtype)[0] for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert errors[0] > 100 * errors[1] > 100 * 100 * errors[2]
    assert errors[1] < 1e-5
