"""Sets of levels that are not evenly spaced, by name."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = 448.0
"""The greatest number of float8 e4m3fn."""


def float8(x: Tensor) -> Tensor:
    """`x` (any floats, any shape) to the nearest number of float8 e4m3fn, half to even; what is larger than all, to
    the largest. NaN stays NaN.

    >>> float8(torch.tensor([1.06, 1.07, 1e9, -500.0])).tolist()
    [1.0, 1.125, 448.0, -448.0]
    """
    return x.clamp(-FLOAT8, FLOAT8).to(torch.float8_e4m3fn)


# fmt: off
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "e4m3fn": tuple(torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).double().tolist()),
}
# fmt: on
"""Levels in the order of their codes, by the name that a layout stores; a power of two of them, 0 among them.

They are data, or exact: a stored weight must mean the same on every machine. `nf4` is NormalFloat4 of QLoRA (arXiv
2305.14314, appendix E), to the last bit of float32: quantiles of the normal distribution at evenly spaced
probabilities from 0.9677083 to a half, eight above zero and seven below, and zero; divided by the largest. `e4m3fn` is
float8, a code being its byte: two zeros, and two codes that are no number.
"""
