"""Which layers deserve a higher rank, for a fixed number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from slimtune.calib.gradients import GradientSketch, LayerSketch


def allocate(gradients: GradientSketch, r: int, cost: Mapping[str, int]) -> dict[str, int]:
    """A rank for each layer: together no more parameters than rank `r` everywhere, and the most gradient in them (or
    variance of inputs).

    A rank more gives a layer its next singular direction of the gradient, worth `σᵢ²`, for its `cost`, `in + out`
    parameters. The directions of the highest worth per parameter are taken until nothing fits; as singular values fall,
    no other choice captures more by its last rank or so. As in GoRA (arXiv 2502.12171) no layer gets less than half of
    `r` or more than twice. With a sketch of inputs a direction is worth the share of their variance that lies along it,
    as in EVA (arXiv 2410.07170), which counts ranks and not parameters.
    """
    low, high = max(1, r // 2), 2 * r
    values = {name: _worths(layer, gradients.of == "inputs") for name, layer in gradients.layers.items()}
    ranks = dict.fromkeys(values, low)
    left = (r - low) * sum(cost.values())

    def worth(name: str) -> float:
        known, rank = values[name], ranks[name]
        return float(known[rank]) / cost[name] if rank < min(high, len(known)) else 0.0

    queue = [(-worth(name), name) for name in values]
    heapify(queue)
    while queue:
        value, name = heappop(queue)
        if value < 0 and cost[name] <= left:
            ranks[name] += 1
            left -= cost[name]
            heappush(queue, (-worth(name), name))
    return ranks


def _worths(layer: LayerSketch, shares: bool) -> list[float]:
    """What each known direction of a layer is worth: its square, or its share of the whole."""
    s = layer.triples.s.double()
    found: list[float] = (s / max(layer.variance, float(s.sum()), 1e-30) if shares else s.square()).tolist()
    return found
