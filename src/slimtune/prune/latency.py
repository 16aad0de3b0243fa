"""How long a block takes at a few widths, on the device it is on: what a unit's absence really saves."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Space
from slimtune.calib.capture import model_inputs
from slimtune.prune.groups import Axis
from slimtune.prune.surgery import PrunePlan, prune_

TOKENS, SHARES, REPEATS = 128, (1.0, 0.75, 0.5, 0.25), 10
"""Tokens of the one window that is timed, the widths, and how often each is."""

Latency = dict[str, list[tuple[int, float]]]
"""Microseconds of a block by how many units of a kind it keeps, ascending, for each kind."""


class _Stop(BaseException):
    """Leaves a forward pass that has shown what it was run for."""


@torch.no_grad()
def latency(model: nn.Module, modelmap: ModelMap, axes: Sequence[Axis], seed: int = 0) -> Latency:
    """Time the first block that has units of each kind, with all of them and with fewer; `model` stays as it is.

    `model` is a Hugging Face model, its layers wrapped or packed or neither. One window of random tokens, drawn by
    `seed`; the least of the repeats, made to rise with the width.
    """
    tokens = torch.randint(modelmap.sizes[Space.VOCAB], (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    training = model.training
    model.eval()
    found: Latency = {}
    for axis in axes:
        if axis.parts and axis.kind not in found:
            run = axis.units // axis.buckets
            args, kwargs = _inputs(model, modelmap.blocks[axis.blocks[0]].name, tokens)
            points: list[tuple[int, float]] = []
            for each in sorted({max(1, round(run * share)) for share in SHARES}):
                kept = tuple(bucket * run + unit for bucket in range(axis.buckets) for unit in range(each))
                block = _narrower(model, modelmap, axis, kept)
                points.append((len(kept), max(_microseconds(block, args, kwargs), points[-1][1] if points else 0.0)))
            found[axis.kind] = points
    model.train(training)
    return found


def at(points: Sequence[tuple[int, float]], units: int) -> float:
    """Microseconds at a width: on the line between the two points about it, or the line of the nearest two.

    >>> [at([(2, 10.0), (4, 20.0), (8, 60.0)], units) for units in (0, 3, 6)]
    [0.0, 15.0, 40.0]
    """
    if len(points) == 1:
        return points[0][1] * units / points[0][0]
    right = next((i for i, (width, _) in enumerate(points) if width >= units and i), len(points) - 1)
    (a, low), (b, high) = points[right - 1], points[right]
    return low + (high - low) * (units - a) / (b - a)


def _inputs(model: nn.Module, block: str, tokens: Tensor) -> tuple[Any, Any]:
    """What a block is called with."""
    seen: list[tuple[Any, Any]] = []

    def take(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise _Stop

    handle = model.get_submodule(block).register_forward_pre_hook(take, with_kwargs=True)
    try:
        cast(Any, model)(**model_inputs(model, tokens), use_cache=False)
    except _Stop:
        return seen[0]
    finally:
        handle.remove()
    raise AssertionError("a forward pass runs every block")


def _narrower(model: nn.Module, modelmap: ModelMap, axis: Axis, kept: tuple[int, ...]) -> nn.Module:
    """A copy of the axis's first block with these units; other blocks share their weights with `model`."""
    blocks = [model.get_submodule(modelmap.blocks[number].name) for number in axis.blocks]
    own = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    smaller = copy.deepcopy(model, shared)
    prune_(smaller, modelmap, PrunePlan((axis,), {axis.name: kept}))
    return smaller.get_submodule(modelmap.blocks[axis.blocks[0]].name)


def _microseconds(block: nn.Module, args: Any, kwargs: Any) -> float:
    device = next(block.parameters()).device
    times = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        block(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:]) * 1e6  # what else the machine does can only add to it
