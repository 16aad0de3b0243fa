"""Fitting what is kept to the outputs of what was there: least squares, one reader at a time.

With `H = XᵀX / n` of a reader's input, `K` the kept columns and `R` the others, `W_K + W_R H[R, K] (H[K, K] + D)⁻¹` is
the weight on `K` alone whose outputs are nearest to `W`'s on the calibration tokens, held back by `D = damp · diag H[K,
K]` from leaving `W_K`. (The reconstruction of SlimGPT and of GRAIL, without their sequence of removals.) Blocks are
fitted in order, each on what the pruned blocks before it hand on.

Damping the step away from `W_K`, each feature by its own energy, is what makes it safe: with the same `d` for all
features, and on the whole of the weight, the few features of huge energy in a feed-forward layer shrink all others, and
fitting did harm where little is pruned (measured, `docs/LOG.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap
from slimtune.calib.capture import calibration_stream
from slimtune.errors import RecipeError
from slimtune.prune.probe import Probe
from slimtune.prune.surgery import PrunePlan
from slimtune.prune.weights import base_layer

DAMP = 0.1
"""Share of the diagonal of `H[K, K]` that is added to it (measured: 0.01 does less good)."""


def fitted(weight: Tensor, hessian: Tensor, kept: Tensor, damp: float = DAMP) -> Tensor:
    """The fitted weight (`[out, kept]`, float64) for `weight` `[out, in]`, `hessian` `[in, in]` and int64 `kept`.

    >>> h = torch.eye(4, dtype=torch.float64); h[0, 1] = h[1, 0] = 1.0  # features 0 and 1 are the same
    >>> fitted(torch.ones(1, 4), h, torch.tensor([0, 2]), damp=0.0).round(decimals=3)
    tensor([[2., 1.]], dtype=torch.float64)
    """
    h, w = hessian.to(torch.float64), weight.to(torch.float64)
    gone = torch.ones(len(h), dtype=torch.bool, device=h.device)
    gone[kept] = False
    inside = h[kept][:, kept]
    diagonal = inside.diagonal()
    diagonal.mul_(1 + damp).add_(1e-6 * float(diagonal.mean()))  # a feature that is always zero stays as it is
    step: Tensor = torch.linalg.solve(inside, (w[:, gone] @ h[gone][:, kept]).T).T
    return w[:, kept] + step


@torch.no_grad()
def refit_(
    model: nn.Module,
    modelmap: ModelMap,
    plan: PrunePlan,
    tokens: Tensor,
    *,
    batch_size: int = 4,
    gates: Probe | None = None,
    whole: Mapping[str, list[Tensor]] | None = None,
    fit: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Fit the readers of every axis to the units that `plan` keeps, in place, and zero what they read of the others.

    Where a reader has a bias, the mean of what went is added to it (FLAP, arXiv 2312.11983), and what varies is fitted.
    To be followed by `prune_`. Returns the share of the outputs' squares that is lost, by the reader's name.

    Without `fit` the weights stay, and biases alone make up for what goes: FLAP's compensation.

    Where `gates` hold units back, their columns stay as they are, since a unit may come back, and a layer may have an
    adapter, which stays as it is: the weight under it is fitted. `whole` are the parameters that readers had in the
    beginning, weight first, when they were fitted before: what is fitted again begins with those.

    Raises `RecipeError` when a reader is not a plain linear: packed weights hide the weight, and so do adapters where
    there are no gates.
    """
    readers = {part.port: (axis.name, part) for axis in plan.axes for part in axis.readers}
    linears = {name: model.get_submodule(name) for name in readers}
    if gates is not None:
        linears = {name: base_layer(module) for name, module in linears.items()}
    for name, module in linears.items():
        if not isinstance(module, nn.Linear):
            raise RecipeError(
                "only a plain linear can be fitted",
                where=name,
                got=type(module).__name__,
                remedy="prune before quantize and lora, or set refit: false",
            )
    lost: dict[str, float] = {}
    with calibration_stream(model, modelmap, tokens, batch_size=batch_size) as stream:
        for number, block in enumerate(modelmap.blocks, start=1):
            own = {port.name: linears[port.name] for port in block.ports if port.name in readers}
            data = {name: [p.data for p in reader.parameters()] for name, reader in own.items()}
            stream.enter(block)  # may compute in fewer bits than the weights have
            for index, stage in enumerate(block.stages):
                for port in stage:
                    if port.name in readers:
                        axis, part = readers[port.name]
                        if gates is not None:  # it is to see all of its input
                            gates.keep(axis, range(len(gates.masks[axis])))
                        stats = stream.collect(block, index, ("hessian", "mean"))
                        if gates is not None:
                            gates.keep(axis, plan.kept[axis])
                        kept = torch.tensor(part.indices(plan.kept[axis]))
                        linear = cast(nn.Linear, own[port.name])  # as found above
                        first = [tensor.clone() for tensor in (data if whole is None else whole)[port.name]]
                        lost[port.name] = _fit_(
                            linear, data[port.name], first, stats, kept, held=gates is not None, fit=fit
                        )
                stream.settle(block, index)
            stream.advance(block, last=number == len(modelmap.blocks))
            if progress is not None:
                progress(number, len(modelmap.blocks))
    return lost


def _fit_(
    linear: nn.Linear,
    data: list[Tensor],
    whole: list[Tensor],
    stats: dict[str, Tensor],
    kept: Tensor,
    *,
    held: bool,
    fit: bool,
) -> float:
    """Fit one reader, whose parameters are `data` and which may compute with rounded copies of them, to what it did
    with those in `whole`; returns the share of its outputs' squares that is lost."""
    weight, h = whole[0].to(torch.float64), stats["hessian"].to(torch.float64)
    mean = stats["mean"].to(torch.float64)
    if linear.bias is not None:
        h = h - torch.outer(mean, mean)
    new = torch.zeros_like(weight)
    new[:, kept] = fitted(weight, h, kept) if fit else weight[:, kept]
    off = new - weight
    energy = float(((weight @ h) * weight).sum())
    if linear.bias is not None:
        data[1].copy_(whole[1] - off @ mean)
    if held:
        new = weight.index_copy(1, kept, new[:, kept])
    data[0].copy_(new)
    for parameter, value in zip(linear.parameters(), data, strict=True):
        parameter.copy_(value)
    return max(float(((off @ h) * off).sum()), 0.0) / max(energy, torch.finfo(torch.float64).tiny)
