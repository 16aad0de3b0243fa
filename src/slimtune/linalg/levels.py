"""Sets of levels that are not evenly spaced, by name."""

from __future__ import annotations

from statistics import NormalDist

QUANTILE = 0.9677083
"""The outermost quantile of NormalFloat levels: halfway between 1 - 1/32 and 1 - 1/30 (bitsandbytes' constant)."""


def normal_float(bits: int) -> tuple[float, ...]:
    """The `2**bits` NormalFloat levels of QLoRA (arXiv 2305.14314, section 3), ascending in [-1, 1].

    Quantiles of the normal distribution at evenly spaced probabilities, one more above zero than below, and zero
    itself; divided by the largest. Rounded to seven decimals, so that they are the same on every machine.

    >>> normal_float(2)
    (-1.0, 0.0, 0.3379152, 1.0)
    """
    half = 2 ** (bits - 1)

    def above(count: int) -> list[float]:
        step = (QUANTILE - 0.5) / count
        return [NormalDist().inv_cdf(QUANTILE - i * step) for i in range(count)]

    levels = sorted([*(-q for q in above(half - 1)), 0.0, *above(half)])
    return tuple(round(level / levels[-1], 7) for level in levels)


LEVELS: dict[str, tuple[float, ...]] = {"nf4": normal_float(4)}
"""Ascending levels by the name that a layout stores; a power of two of them, 0 among them."""
