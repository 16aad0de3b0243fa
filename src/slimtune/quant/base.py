"""The two words of quantization: a `QTensor` is a weight in few bits, a `Quantizer` makes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slimtune.errors import FormatError, RecipeError
from slimtune.quant.layouts import Layout

Stats = Mapping[str, Tensor]
"""What calibration collected for a layer, by the names a quantizer `needs`: `hessian` is float32 `[in, in]`."""


@dataclass(frozen=True)
class QTensor:
    """A weight `[out, in]` in few bits: packed tensors, and the layout that decodes them.

    Raises `FormatError` when a tensor is missing, unexpected, or of another shape or dtype than the layout says: a
    `QTensor` that exists can be decoded.
    """

    tensors: dict[str, Tensor]
    layout: Layout

    def __post_init__(self) -> None:
        wanted = self.layout.tensors()
        if set(self.tensors) != set(wanted):
            raise FormatError(
                "a quantized weight has the wrong tensors", got=sorted(self.tensors), wanted=sorted(wanted)
            )
        for name, (shape, dtype) in wanted.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise FormatError(
                    "a quantized weight has a wrong tensor",
                    where=name,
                    got=f"{tensor.dtype} {list(tensor.shape)}",
                    wanted=f"{dtype} {list(shape)}",
                )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the codes stand for, `dtype [out, in]`."""
        return self.layout.dequantize(self.tensors, dtype)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors: codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, everything counted, per weight."""
        return 8 * self.bytes / (self.layout.out_features * self.layout.in_features)


def check_share(gptaq: float) -> None:
    """Raise `RecipeError` unless the share of the drift that a quantizer makes up for is one."""
    if not 0 <= gptaq <= 1:
        raise RecipeError("gptaq out of range", got=gptaq, wanted="0 to 1")


class Quantizer(Protocol):
    """A method that turns one weight into few bits: a frozen dataclass whose fields are its hyper-parameters.

    Calling it is pure and deterministic: `(weight [out, in], stats) -> QTensor`. `needs` names the statistics it wants
    (keys of `slimtune.calib.stats.STATISTICS`); a quantizer that needs none runs without calibration data.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Names of statistics."""

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        """Quantize `weight` (float `[out, in]`)."""


def relative_error(weight: Tensor, dense: Tensor, hessian: Tensor | None) -> float:
    """`tr(D H Dᵀ) / tr(W H Wᵀ)` with `D = Ŵ - W`; `H` is the identity where there is none."""
    off = dense - weight
    hessian = None if hessian is None else hessian.to(weight.dtype)

    def energy(w: Tensor) -> float:
        return float(((w if hessian is None else w @ hessian) * w).sum())

    return max(energy(off), 0.0) / max(energy(weight), torch.finfo(torch.float32).tiny)
