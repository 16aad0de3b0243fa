"""Which units stay: the cheapest that reach a share of the parameters, all blocks alike or wherever it costs least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.arch import ModelMap, Space
from slimtune.errors import RecipeError
from slimtune.prune.groups import Axis, Kept, Kind
from slimtune.prune.latency import Latency, at

TINY = 1e-9
"""What a run saves at least, whatever a clock said."""


@dataclass(frozen=True)
class Chunk:
    """Units of an axis that go together, what that costs and what it frees: parameters, and what scores are weighed
    against (those, or microseconds)."""

    units: tuple[int, ...]
    score: float
    parameters: int
    saves: float


def chunks(axis: Axis, scores: Tensor, step: int = 1, latency: Latency | None = None) -> tuple[Chunk, ...]:
    """All units of `axis` from the least to the most important, in runs that keep its width legal.

    A run of channels is `step` of them (the first one what is over, so that the rest is a multiple), of query heads one
    of each KV group. Ties go to the lower index. With a `latency`, a run saves the microseconds that it takes.

    >>> axis = Axis("o", "ffn", (0,), 5, (), 10)
    >>> [chunk.units for chunk in chunks(axis, torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), 2)]
    [(1,), (3, 4), (2, 0)]
    """
    order = torch.argsort(scores.view(axis.buckets, -1), dim=1, stable=True)
    order += torch.arange(axis.buckets).unsqueeze(1) * order.shape[1]
    step = axis.units if axis.whole else step if axis.kind == "ffn" else 1
    first = order.shape[1] % step
    ends = [*([first] if first else []), *range(first + step, order.shape[1] + 1, step)]
    runs = (order[:, a:b].flatten().tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True))
    made: list[Chunk] = []
    left = axis.units
    for run in runs:
        freed = len(run) * axis.parameters
        points = latency and latency.get(axis.kind)
        saves = at(points, left) - at(points, left - len(run)) if points else float(freed)
        left -= len(run)
        made.append(Chunk(tuple(run), float(scores[run].sum()), freed, max(saves, TINY)))
    return tuple(made)


def select(
    modelmap: ModelMap,
    axes: Sequence[Axis],
    scores: Mapping[str, Tensor],
    remove: float,
    *,
    step: int = 8,
    additive: bool = False,
    allocated: bool = False,
    none: bool = False,
    latency: Latency | None = None,
) -> Kept:
    """The units to keep so that about `remove` parameters go.

    Args:
        modelmap: the model's map, which says how many heads its configuration can hold.
        axes: where units may go.
        scores: a score for each unit.
        remove: how many parameters to remove; met to within one unit of the narrowest kind in all blocks (with
            `allocated`, in one).
        step: kept FFN channels are a multiple of this.
        additive: the scores are changes of the loss; otherwise each axis's are taken as shares of their sum, so that
            attention and FFN can be weighed against each other.
        allocated: widths differ between blocks, by score per parameter (or per microsecond).
        latency: what widths take: of the ways to remove as much, the one with least score per microsecond is chosen.
        none: it is no fault when nothing goes.

    Raises `RecipeError` when that many parameters cannot go (one run of units stays everywhere), or when they are fewer
    than half of what goes at once.
    """
    ladders = {axis.name: chunks(axis, _comparable(scores[axis.name], additive), step, latency) for axis in axes}
    most = sum(chunk.parameters for axis in axes for chunk in ladders[axis.name][: _limit(axis, ladders[axis.name])])
    least = min(ladder[0].parameters for ladder in ladders.values())
    if remove > most + least / 2:
        raise RecipeError(
            "this much cannot be pruned",
            where="ratio",
            got=f"{remove:,.0f} parameters to remove",
            wanted=f"at most {most:,}: something of every sub-layer stays",
            remedy="lower ratio, add targets, or lower multiple_of",
        )
    timed = latency is not None
    gone = _allocated(axes, ladders, remove) if allocated else _uniform(modelmap, axes, ladders, remove, timed)
    if not any(gone.values()) and not none:
        raise RecipeError(
            "nothing would be pruned: the ratio is below half of the smallest step",
            where="ratio",
            got=f"{remove:,.0f} parameters to remove",
            wanted=f"a step of {least if allocated else _step(axes, ladders):,}",
            remedy="raise ratio, add targets, or lower multiple_of",
        )
    return {
        axis.name: tuple(sorted(unit for chunk in ladders[axis.name][gone[axis.name] :] for unit in chunk.units))
        for axis in axes
    }


def _comparable(scores: Tensor, additive: bool) -> Tensor:
    return scores if additive else scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)


Ladders = Mapping[str, Sequence[Chunk]]


def _limit(axis: Axis, ladder: Sequence[Chunk]) -> int:
    """How many chunks may go: of an axis that is cut, one stays."""
    return len(ladder) - (not axis.whole)


def _allocated(axes: Sequence[Axis], ladders: Ladders, remove: float) -> dict[str, int]:
    """Chunks to take off each ladder: always the one that costs least a parameter, until enough are gone."""
    gone = dict.fromkeys(ladders, 0)
    most = {axis.name: _limit(axis, ladders[axis.name]) for axis in axes}
    freed = 0.0
    while True:
        tips = {name: ladder[gone[name]] for name, ladder in ladders.items() if gone[name] < most[name]}
        tips = {name: tip for name, tip in tips.items() if freed + tip.parameters / 2 <= remove}
        if not tips:
            return gone
        name = min(tips, key=lambda name: tips[name].score / tips[name].saves)
        gone[name] += 1
        freed += tips[name].parameters


def _uniform(
    modelmap: ModelMap, axes: Sequence[Axis], ladders: Ladders, remove: float, timed: bool = False
) -> dict[str, int]:
    """As many chunks off every axis of a kind: of the ways to come near `remove`, the one that loses least (for what it
    saves, where that is `timed`)."""
    kinds = list(dict.fromkeys(axis.kind for axis in axes))
    members = {kind: [axis for axis in axes if axis.kind == kind] for kind in kinds}
    lengths = {kind: min(len(ladders[axis.name]) for axis in members[kind]) for kind in kinds}
    frees = {kind: [_sum(members[kind], ladders, n, "parameters") for n in range(lengths[kind])] for kind in kinds}
    costs = {kind: [_sum(members[kind], ladders, n, "score") for n in range(lengths[kind])] for kind in kinds}
    saves = {kind: [_sum(members[kind], ladders, n, "saves") for n in range(lengths[kind])] for kind in kinds}
    legal = {kind: [n for n in range(lengths[kind]) if _fits(modelmap, members[kind][0], n)] for kind in kinds}
    fine = min(kinds, key=lambda kind: frees[kind][1] if lengths[kind] > 1 else float("inf"))
    ways: list[tuple[float, float, dict[Kind, int]]] = []
    for n in legal[next((kind for kind in kinds if kind != fine), fine)]:
        taken: dict[Kind, int] = {kind: n for kind in kinds if kind != fine}
        freed = sum(frees[kind][m] for kind, m in taken.items())
        last = min(legal[fine], key=lambda m: abs(freed + frees[fine][m] - remove))
        way = {**taken, fine: last}
        off = abs(sum(frees[kind][way[kind]] for kind in kinds) - remove)
        lost, saved = (sum(facts[kind][way[kind]] for kind in kinds) for facts in (costs, saves))
        ways.append((off, lost / max(saved, TINY) if timed else lost, way))
    unit = frees[fine][1] if lengths[fine] > 1 else 0
    near = [way for way in ways if way[0] <= unit / 2] or [min(ways, key=lambda way: way[0])]
    best = min(near, key=lambda way: way[1])[2]
    return {axis.name: best[axis.kind] for axis in axes}


def _step(axes: Sequence[Axis], ladders: Ladders) -> int:
    """The fewest parameters that go when all blocks lose a run of a kind."""
    kinds = {axis.kind for axis in axes}
    return min(sum(ladders[axis.name][0].parameters for axis in axes if axis.kind == kind) for kind in kinds)


def _sum(axes: Sequence[Axis], ladders: Ladders, n: int, fact: str) -> float:
    return float(sum(getattr(chunk, fact) for axis in axes for chunk in ladders[axis.name][:n]))


def _fits(modelmap: ModelMap, axis: Axis, gone: int) -> bool:
    """Whether a configuration can say that `gone` runs of heads are missing."""
    widths = modelmap.widths
    if axis.kind not in ("kv", "heads") or not widths.divides:
        return True
    biased = any(port.bias for port in modelmap.linears)
    heads = modelmap.heads - gone * (modelmap.heads // (axis.units // axis.buckets))
    return bool(widths.stand_in and not biased) or modelmap.sizes[Space.RESIDUAL] % heads == 0
