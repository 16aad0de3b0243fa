"""How far a start that changes the model should go: a line search on the loss itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

MOST = 12
"""Sizes that are tried, at most."""


@dataclass(frozen=True)
class Search:
    """What was found: the `size` to take (0 where no step was downhill), and the loss without a step and with it."""

    size: float
    before: float
    after: float
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `report.json`."""
        return asdict(self)


def line_search(loss: Callable[[float], float], *, factor: float = 2.0, most: int = MOST) -> Search:
    """The size with the least loss among powers of `factor`, if it is below that of no step at all.

    From 1, sizes shrink until one is below the loss at 0 and the next is worse; where 1 itself is below and half of it
    is worse, they grow as long as that helps. For a loss with one valley along the line, that is the bottom to within
    `factor`. A loss that is not a number counts as infinite.

    >>> line_search(lambda size: (size - 0.25) ** 2)
    Search(size=0.25, before=0.0625, after=0.0, tried=4)
    """

    def at(size: float) -> float:
        value = loss(size)
        return value if math.isfinite(value) else math.inf

    before = at(0.0)
    size, after, tried = 1.0, at(1.0), 1
    step = 1 / factor
    while tried < most:
        value = at(size * step)
        tried += 1
        if value < after or after >= before:
            size, after = size * step, value
        elif size == 1.0 and step < 1:  # half of it is worse: further, then
            step = factor
        else:
            break
    return Search(size, before, after, tried) if after < before else Search(0.0, before, before, tried)
