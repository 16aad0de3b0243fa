"""Which layers deserve a higher rank, for a fixed number of parameters."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from slimtune.calib.gradients import GradientSketch


def allocate(gradients: GradientSketch, r: int) -> dict[str, int]:
    """A rank for each layer: together no more parameters than rank `r` everywhere, and the most gradient in them.

    A rank more gives a layer its next singular direction of the gradient, worth `σᵢ²`, for `in + out` parameters. The
    directions of the highest worth per parameter are taken until nothing fits; as singular values fall, no other choice
    captures more by its last rank or so. As in GoRA (arXiv 2502.12171) no layer gets less than half of `r` or more than
    twice; EVA (arXiv 2410.07170) shares out the variance of activations in this way.
    """
    low, high = max(1, r // 2), 2 * r
    cost = {name: len(layer.triples.u) + len(layer.triples.v) for name, layer in gradients.layers.items()}
    values = {name: layer.triples.s.double().square().tolist() for name, layer in gradients.layers.items()}
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
