"""Scores of a model's units from calibration windows, all at once: what one-shot pruning looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimtune.arch import ModelMap
from slimtune.calib.capture import model_inputs
from slimtune.errors import CalibrationError
from slimtune.kernels.precision import fast_matmul
from slimtune.prune.groups import Axis, possible
from slimtune.prune.groups import axes as every_axis
from slimtune.prune.importance import Importance
from slimtune.prune.probe import Normalise, Probe, Scores

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
        axes: what to score. Whole layers get the sum of the scores of all their other units.
        importance: the measure.
        tokens: windows `[samples, length]`.
        batch_size: windows that run together.
        normalise: see `Probe.take`.
        seed: of the measure that is random.
        progress: called with (batches done, all batches).

    Raises `CalibrationError` when the importance needs data and there is none, or a score is not finite.
    """
    layers = [axis for axis in axes if axis.kind == "layers"]
    if layers:
        inner = [kind for kind in possible(modelmap) if kind in ("kv", "ffn")]
        axes = every_axis(modelmap, inner)
    needs_data = bool(importance.needs - {"noise"})
    if needs_data and tokens is None:
        raise CalibrationError("the importance needs calibration data", wanted=", ".join(sorted(importance.needs)))
    with Probe(model, modelmap, axes, importance, seed) as probe:
        if needs_data and tokens is not None:
            batches = tokens.split(batch_size)
            backward = bool(GRADIENTS & importance.needs)
            with _frozen(model, but_adapters="lora_gradient" in importance.needs), torch.set_grad_enabled(backward):
                for number, batch in enumerate(batches, start=1):
                    _run(model, batch, backward)
                    if progress is not None:
                        progress(number, len(batches))
                scores = probe.take(normalise)
        else:
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


def _run(model: nn.Module, tokens: Tensor, backward: bool) -> None:
    """Forward, and backward from the sum over windows of the mean loss of their tokens."""
    inputs = model_inputs(model, tokens)
    with fast_matmul():
        logits = cast(Tensor, cast(Any, model)(**inputs, use_cache=False).logits)
        if backward:
            wanted = inputs.get("decoder_input_ids", inputs["input_ids"])[:, 1:]
            logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            loss = cross_entropy(logits.transpose(1, 2), wanted, reduction="sum") / wanted.shape[1]
            loss.backward()


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
