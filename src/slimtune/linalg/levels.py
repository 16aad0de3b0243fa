"""Sets of levels that are not evenly spaced, by name."""

from __future__ import annotations

# fmt: off
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}
# fmt: on
"""Ascending levels by the name that a layout stores; a power of two of them, 0 among them.

They are data, not computed: a stored weight must mean the same on every machine. `nf4` is NormalFloat4 of QLoRA (arXiv
2305.14314, appendix E), to the last bit of float32: quantiles of the normal distribution at evenly spaced
probabilities from 0.9677083 to a half, eight above zero and seven below, and zero; divided by the largest.
"""
