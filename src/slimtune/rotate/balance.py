"""Channels balanced before they turn: scales that make what rounding costs least.

A token `x` whose channels are mixed by a turn is rounded with an error that is alike in all of them and grows with
`|x|`; so is a weight. With channel `i` of the inputs multiplied by `d_i` and of the weights divided by it, what both
errors put into the outputs is proportional to `Σ d_i² C_i · Σ S_i / d_i²`, where `C_i` is the mean square of the
channel and `S_i` that of the weights that read it. By Cauchy and Schwarz it is least, `(Σ √(C_i S_i))²`, for
`d_i⁴ = S_i / C_i`. (WUSH, arXiv 2512.00956, has the best of all linear maps, block by block; OSTQuant, 2501.13987,
learns scales beside a rotation.) They cost nothing to run: those of a norm are its gain, those behind a gate rows of
a linear.

Where R1 has turned the residual stream, a norm's channels are mixed already, and all alike: norms are balanced where
inputs turn online, feed-forward channels always. Each site is balanced for weights as they were: that the rows of the
linear behind a gate are scaled themselves is not seen by the norm before it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Norm
from slimtune.calib.watch import watch
from slimtune.rotate.basis import Basis, gates, turns_inputs

FLOOR = 1e-4
"""Of the mean: what a mean square counts for at least, so that a channel that calibration hardly saw gets no scale out
of proportion. Nothing was tried beside it."""


class _Site:
    """Channels that can be scaled: the linears that read them, and the squares that were seen there."""

    def __init__(self, readers: tuple[str, ...]) -> None:
        self.readers = readers
        self.inputs = torch.zeros((), dtype=torch.float64)
        self.weights: dict[str, Tensor] = {}

    def see(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the inputs of the first reader; the weight of each once (it may be in memory for this call alone)."""
        x, weight = args[0].detach(), module.get_parameter("weight").detach()
        if name == self.readers[0]:
            self.inputs = self.inputs + x.reshape(-1, x.shape[-1]).double().square().sum(0)
        if name not in self.weights:
            self.weights[name] = weight.double().square().sum(0)


def scales(inputs: Tensor, weights: Tensor) -> Tensor:
    """What to multiply channels by, float64 `[channels]`, of geometric mean 1.

    Args:
        inputs: the sum (or mean) of the squares of what each channel holds, float64 `[channels]`.
        weights: that of the weights that read it.

    Example:
        >>> scales(torch.tensor([1.0, 16.0]).double(), torch.tensor([1.0, 1.0]).double())
        tensor([1.4142, 0.7071], dtype=torch.float64)
    """
    parts = [torch.maximum(x, FLOOR * x.mean()).clamp(min=1e-30) for x in (weights, inputs)]
    found = (parts[0] / parts[1]).log() / 4
    return (found - found.mean()).exp()


def balance(model: nn.Module, modelmap: ModelMap, basis: Basis, tokens: Tensor) -> Basis:
    """`basis` with its scales, of `model`, which is not rotated yet, and what it computes of `tokens`
    `[samples, length]`."""
    norms = {norm.name: _Site(norm.feeds) for norm in modelmap.norms if _balanced(model, modelmap, basis, norm)}
    behind = {last.name: _Site((last.name,)) for block in modelmap.blocks for _, last in gates(block)}
    sites = [*norms.values(), *behind.values()]
    watch(model, tokens, [(name, partial(site.see, name)) for site in sites for name in site.readers])
    found = {
        name: scales(site.inputs, torch.stack([*site.weights.values()]).sum(0))
        for name, site in (norms | behind).items()
    }
    gains = {name: 1 / found[name] for name in norms}
    return replace(basis, gains={**basis.gains, **gains}, scales={name: found[name] for name in behind})


def _balanced(model: nn.Module, modelmap: ModelMap, basis: Basis, norm: Norm) -> bool:
    """Whether all that `norm` feeds turns its inputs, and the norm has a gain to take the scales."""
    turned = norm.feeds and all(turns_inputs(modelmap[name]) for name in norm.feeds)
    gain = "weight" in dict(model.get_submodule(norm.name).named_parameters())
    return not basis.rotation.folds and bool(turned) and gain
