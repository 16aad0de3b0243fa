"""Scores of a model's units from calibration windows, all at once: what one-shot pruning looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap
from slimtune.calib.cpu import cpu_kernels
from slimtune.calib.loss import chunked_loss
from slimtune.errors import CalibrationError
from slimtune.kernels.precision import fast_matmul
from slimtune.prune.groups import Axis, possible
from slimtune.prune.groups import axes as every_axis
from slimtune.prune.importance import Importance
from slimtune.prune.probe import Normalise, Probe, Scores
from slimtune.prune.removal import MEASURED, influences, loss_changes, loss_of

GRADIENTS = frozenset(("gate", "gate_squares", "gradient", "lora_gradient"))
"""Statistics that take a backward pass."""

BATCH = 2
"""Windows that run together."""


def collect(
    model: nn.Module,
    modelmap: ModelMap,
    axes: Sequence[Axis],
    importance: Importance,
    tokens: Tensor | None = None,
    *,
    batch_size: int = BATCH,
    normalise: Normalise = "none",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """The scores of every unit, from calibration windows where the importance needs any.

    Args:
        model: a Hugging Face model without its `PeftModel` (its layers may be wrapped); it is left as it was.
        modelmap: its map.
        axes: what to score. Whole layers get the sum of the scores of all their other units, unless the importance
            looks at layers as they are.
        importance: the measure.
        tokens: windows `[samples, length]`.
        batch_size: windows that run together.
        normalise: see `Probe.take`.
        seed: of the measure that is random.
        progress: called with (batches done, all batches).

    Raises `CalibrationError` when the importance needs data and there is none, or a score is not finite.
    """
    measured = importance.needs & MEASURED
    layers = [] if measured else [axis for axis in axes if axis.kind == "layers"]
    if layers:
        inner = [kind for kind in possible(modelmap) if kind in ("kv", "ffn")]
        axes = every_axis(modelmap, inner)
    needs_data = bool(importance.needs - {"noise"})
    if needs_data and tokens is None:
        raise CalibrationError("the importance needs calibration data", wanted=", ".join(sorted(importance.needs)))
    backward = bool(GRADIENTS & importance.needs)
    frozen = _frozen(model, but_adapters="lora_gradient" in importance.needs)
    with frozen, cpu_kernels(model), chunked_loss(model), torch.set_grad_enabled(backward):
        if measured and tokens is not None:
            scores = _measured(model, modelmap, axes, importance, tokens, batch_size, progress)
        else:
            with Probe(model, modelmap, axes, importance, seed) as probe:
                batches = tokens.split(batch_size) if needs_data and tokens is not None else ()
                for number, batch in enumerate(batches, start=1):
                    with fast_matmul():
                        loss = loss_of(model, batch)
                        if backward:
                            loss.backward()
                    if progress is not None:
                        progress(number, len(batches))
                scores = probe.take(normalise)
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise CalibrationError(
                "the scores of a layer are not finite", where=name, remedy="use dtype: float32, or check the data"
            )
    if not layers:
        return scores
    blocks = torch.zeros(len(modelmap.blocks), dtype=torch.float64)
    for axis in axes:
        blocks[list(axis.blocks)] += scores[axis.name].sum() / len(axis.blocks)
    return {axis.name: blocks[list(axis.blocks)] for axis in layers}


def _measured(
    model: nn.Module,
    modelmap: ModelMap,
    axes: Sequence[Axis],
    importance: Importance,
    tokens: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Scores:
    """Scores of units by what happens around them or without them; an importance sees no weights here."""
    stats: dict[str, dict[str, Tensor]] = {}
    if "influence" in importance.needs:
        if cut := next((axis for axis in axes if axis.kind != "layers"), None):
            raise CalibrationError("only whole layers have an influence", where=cut.name, remedy="use targets: layers")
        stats["influence"] = influences(model, axes, tokens, batch_size=batch_size, progress=progress)
    if "loss_change" in importance.needs:
        stats["loss_change"] = loss_changes(model, modelmap, axes, tokens, batch_size=batch_size, progress=progress)
    return {
        axis.name: importance(torch.empty(axis.units, 0, 0), {name: held[axis.name] for name, held in stats.items()})
        for axis in axes
    }


@contextmanager
def _frozen(model: nn.Module, *, but_adapters: bool) -> Iterator[None]:
    """No weight gets a gradient in the block, unless it is an adapter's and they are wanted; then as it was."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    training = model.training
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(but_adapters and (".lora_A." in name or ".lora_B." in name))
        parameter.grad = None
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter, (trains, grad) in before.items():
            parameter.requires_grad_(trains)
            parameter.grad = grad
