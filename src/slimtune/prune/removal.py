"""What is seen of units by running the model without them, or around them: influence, and the true change of the loss.

The measures of depth pruning: ShortGPT's block influence (arXiv 2403.03853) takes one forward pass, Shortened LLaMA's
loss without a block (arXiv 2402.02834) one for each block. The same runs tell what any unit is really worth. Products
are in full precision: what one unit changes is little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from slimtune.arch import ModelMap
from slimtune.calib.capture import model_inputs
from slimtune.calib.loss import has_plain_head
from slimtune.prune.groups import Axis
from slimtune.prune.importance import Magnitude
from slimtune.prune.probe import Probe

MEASURED = frozenset(("influence", "loss_change"))
"""Statistics that are found here: of units as they are or are not, not of weights."""

Progress = Callable[[int, int], None]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The sum over windows (`[batch, length]`) of the mean loss of their tokens, nats."""
    inputs = model_inputs(model, tokens)
    if has_plain_head(model):
        loss = cast(Any, model)(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        return cast(Tensor, loss) * len(tokens)
    logits = cast(Tensor, cast(Any, model)(**inputs, use_cache=False).logits)
    wanted = inputs.get("decoder_input_ids", inputs["input_ids"])[:, 1:]
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.transpose(1, 2), wanted, reduction="sum") / wanted.shape[1]


@torch.no_grad()
def loss_changes(
    model: nn.Module,
    modelmap: ModelMap,
    axes: Sequence[Axis],
    tokens: Tensor,
    *,
    units: Mapping[str, Sequence[int]] | None = None,
    batch_size: int = 2,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """By how much the mean loss of `tokens` (`[windows, length]`) rises without each unit: float64, by axis's name.

    `model` is in evaluation mode. `units` names those to look at, by axis (all, where absent); the others are zero.
    The units of an axis that goes as a whole share what its absence costs.
    """
    wanted = {axis.name: range(axis.units) if units is None else units.get(axis.name, ()) for axis in axes}
    runs: list[tuple[Axis, tuple[int, ...]]]
    runs = [(axis, (unit,)) for axis in axes if not axis.whole for unit in wanted[axis.name]]
    runs += [(axis, tuple(range(axis.units))) for axis in axes if axis.whole and len(wanted[axis.name])]
    changes = {axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in axes}

    def mean_loss() -> float:
        return sum(float(loss_of(model, batch)) for batch in tokens.split(batch_size)) / len(tokens)

    with Probe(model, modelmap, axes, Magnitude()) as probe:
        dense = mean_loss()
        for number, (axis, gone) in enumerate(runs, start=1):
            if axis.parts:
                probe.keep(axis.name, [unit for unit in range(axis.units) if unit not in gone])
            with nullcontext() if axis.parts else _around(model, f"{axis.name}.{gone[0]}"):
                changes[axis.name][list(gone)] = (mean_loss() - dense) / len(gone)
            if axis.parts:
                probe.keep(axis.name, range(axis.units))
            if progress is not None:
                progress(number, len(runs))
    return changes


@torch.no_grad()
def influences(
    model: nn.Module, axes: Sequence[Axis], tokens: Tensor, *, batch_size: int = 2, progress: Progress | None = None
) -> dict[str, Tensor]:
    """ShortGPT's influence of whole blocks: one minus the mean cosine of what a block reads and what it makes."""
    totals = {axis.name: torch.zeros(axis.units, dtype=torch.float64) for axis in axes}
    count = 0

    def seen(total: Tensor, unit: int) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            made = (output if isinstance(output, Tensor) else output[0]).to(torch.float32)
            total[unit] += float(
                (1 - cosine_similarity(_read(args, kwargs).to(made.dtype), made, dim=-1)).mean(-1).sum()
            )

        return look

    handles = [
        model.get_submodule(f"{axis.name}.{unit}").register_forward_hook(
            seen(totals[axis.name], unit), with_kwargs=True
        )
        for axis in axes
        for unit in range(axis.units)
    ]
    try:
        for batch in tokens.split(batch_size):
            count += len(batch)
            cast(Any, model)(**model_inputs(model, batch), use_cache=False)
            if progress is not None:
                progress(count, len(tokens))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in totals.items()}


@contextmanager
def _around(model: nn.Module, block: str) -> Iterator[None]:
    """Within the context `block` hands on what it reads."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = _read(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = model.get_submodule(block).register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])
