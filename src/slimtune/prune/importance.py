"""How much a unit matters: pure functions of one weight's share in each unit and of what was seen of it.

An importance is called once for each part of an axis that it `looks_at`, with the part's weight as `[units, size, n]`
(`size` rows or columns a unit, `n` the other side) and the statistics it `needs`, and returns `[units]`; the scores of
all parts are added. It may be asked about some units at a time, and sees no weight where gates are all it needs. With
gradients taken at the output `L` of a loss, `W` a weight and `m` a gate that multiplies what a unit hands to the
reader, the statistics are

- `gate`, `gate_squares` `[units]`: the mean over sequences of `dL/dm`, and of its square;
- `gradient` `[units, size, n]`: `dL/dW`, one module and one batch at a time (the scores of batches are averaged);
- `lora_gradient` `[units, size, n]`: its estimate from the gradients of LoRA factors;
- `mean`, `second` `[units, size]`: mean and mean square of the reader's input;
- `influence` `[units]`: one minus the mean cosine of what a whole block reads and what it makes;
- `loss_change` `[units]`: by how much the loss rises when the model runs without the unit;
- `noise` `[units]`: uniform random numbers.

Example:
    >>> import torch
    >>> w = torch.ones(3, 2, 4)
    >>> Magnitude()(w, {})
    tensor([8., 8., 8.])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

Stats = Mapping[str, Tensor]
Side = Literal["reads", "writes"]
BOTH: frozenset[Side] = frozenset(("reads", "writes"))
READS: frozenset[Side] = frozenset(("reads",))


class Importance(Protocol):
    """A measure of units: a frozen dataclass whose fields are its options.

    `needs` names the statistics it wants; `looks_at` says of which parts: those of the ports that read the space,
    those that write it. `additive` says that scores are changes of the loss, comparable between kinds of units.
    """

    needs: ClassVar[frozenset[str]]
    looks_at: ClassVar[frozenset[Side]]
    additive: ClassVar[bool]

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Scores `[units]` of `weight` (`[units, size, n]`): the higher, the dearer."""


@dataclass(frozen=True)
class Lora:
    """LoRAPrune's code: weight times the gradient that LoRA's factors stand for, absolute."""

    needs: ClassVar[frozenset[str]] = frozenset(("lora_gradient",))
    looks_at: ClassVar[frozenset[Side]] = BOTH
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """|W ⊙ G| summed, `G` the estimate of the gradient."""
        return (weight * stats["lora_gradient"]).abs().sum((1, 2))


@dataclass(frozen=True)
class LoraSquared:
    """LoRAPrune's paper (arXiv 2305.18403): the same product, squared."""

    needs: ClassVar[frozenset[str]] = frozenset(("lora_gradient",))
    looks_at: ClassVar[frozenset[Side]] = BOTH
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """(W ⊙ G)² summed, `G` the estimate of the gradient."""
        return (weight * stats["lora_gradient"]).square().sum((1, 2))


@dataclass(frozen=True)
class Gate:
    """The exact first-order change of the loss when a unit goes: the gradient of a gate on it."""

    needs: ClassVar[frozenset[str]] = frozenset(("gate",))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = True

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """|dL/dm|."""
        return stats["gate"].abs()


@dataclass(frozen=True)
class GateFisher:
    """The mean square of a gate's gradient over sequences: a diagonal second-order change of the loss."""

    needs: ClassVar[frozenset[str]] = frozenset(("gate_squares",))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = True

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """E[(dL/dm)²] / 2."""
        return stats["gate_squares"] / 2


@dataclass(frozen=True)
class WeightTaylor:
    """LLM-Pruner (arXiv 2305.11627), first order: weight times its gradient, no gradient kept beyond its module."""

    needs: ClassVar[frozenset[str]] = frozenset(("gradient",))
    looks_at: ClassVar[frozenset[Side]] = BOTH
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """|W ⊙ dL/dW| summed."""
        return (weight * stats["gradient"]).abs().sum((1, 2))


@dataclass(frozen=True)
class Flap:
    """FLAP (arXiv 2312.11983): how much the reader's input varies, times the squared weights that read it."""

    needs: ClassVar[frozenset[str]] = frozenset(("mean", "second"))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """var(x_j) |W_:j|² summed over a unit's features."""
        variance = (stats["second"] - stats["mean"].square()).clamp(min=0)
        return (variance * weight.square().sum(2)).sum(1)


@dataclass(frozen=True)
class Wanda:
    """Wanda (arXiv 2306.11695), structured: absolute weights times the norm of what they read."""

    needs: ClassVar[frozenset[str]] = frozenset(("second",))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """rms(x_j) |W_:j|₁ summed over a unit's features."""
        return (stats["second"].sqrt() * weight.abs().sum(2)).sum(1)


@dataclass(frozen=True)
class Magnitude:
    """The squared weights of a unit; looks at no data."""

    needs: ClassVar[frozenset[str]] = frozenset()
    looks_at: ClassVar[frozenset[Side]] = BOTH
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """W² summed."""
        return weight.square().sum((1, 2))


@dataclass(frozen=True)
class Influence:
    """ShortGPT's block influence (arXiv 2403.03853), of whole layers: how far a block turns what it reads."""

    needs: ClassVar[frozenset[str]] = frozenset(("influence",))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """1 - E[cos(x, block(x))]."""
        return stats["influence"]


@dataclass(frozen=True)
class LossChange:
    """What the loss rises by without a unit (Shortened LLaMA, arXiv 2402.02834): a run of all windows for each unit."""

    needs: ClassVar[frozenset[str]] = frozenset(("loss_change",))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = True

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """The loss without the unit, less the loss with it."""
        return stats["loss_change"]


@dataclass(frozen=True)
class Random:
    """By chance: what every other measure must beat."""

    needs: ClassVar[frozenset[str]] = frozenset(("noise",))
    looks_at: ClassVar[frozenset[Side]] = READS
    additive: ClassVar[bool] = False

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """What the dice said."""
        return stats["noise"]


def lora_gradient(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """LoRAPrune's estimate of `dL/dW` (`[out, in]`): the step of `BA` under gradient descent with a rate of one.

    `gB A + B gA - gB gA`, with `a`, `grad_a` `[r, in]` and `b`, `grad_b` `[out, r]`.
    """
    return grad_b @ a + b @ grad_a - grad_b @ grad_a
