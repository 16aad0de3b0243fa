"""How uneven the inputs of a model's linears are: what few bits for activations suffer from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap
from slimtune.calib.watch import watch

BINS = 128
"""Magnitudes that are kept of an input; where it has more channels, each is the largest of a run of them."""


@dataclass(frozen=True)
class Outliers:
    """The evenness of one linear's input.

    `kurtosis` is that of the channels of one token, averaged over tokens: 3 for a Gaussian, and the higher the more a
    few channels stand out. `peak` is the largest magnitude of a channel over their median, where a channel's magnitude
    is its largest over all tokens; `channels` are these magnitudes, at most `BINS` of them.
    """

    kurtosis: float
    peak: float
    channels: tuple[float, ...]


def outliers(model: nn.Module, modelmap: ModelMap, tokens: Tensor, *, batch_size: int = 4) -> dict[str, Outliers]:
    """The evenness of the input of each linear in the blocks of `model`, by name, on `tokens` `[samples, length]`.

    The whole model runs, in the dtype it has. Linears of one stage share their input and are measured once.
    """
    stages = [[port for port in stage if port.kind == "linear"] for block in modelmap.blocks for stage in block.stages]
    meters = [(stage, _Meter()) for stage in stages if stage]
    watch(model, tokens, [(stage[0].name, meter.hook) for stage, meter in meters], batch_size=batch_size)
    results = [(stage, meter.result()) for stage, meter in meters]
    return {port.name: result for stage, result in results for port in stage}


class _Meter:
    """Running sums over the tokens of one input."""

    def __init__(self) -> None:
        self.kurtosis, self.tokens = 0.0, 0
        self.peaks: Tensor | None = None

    @property
    def hook(self) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """What a linear calls before it runs."""
        return lambda _, args: self.update(args[0])

    def update(self, x: Tensor) -> None:
        """Add tokens, `[..., channels]`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        off = rows - rows.mean(1, keepdim=True)
        square = off.square()
        variance = square.mean(1).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
        self.kurtosis += float((square.square().mean(1) / variance.square()).sum())
        self.tokens += len(rows)
        peaks = rows.abs().amax(0)
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)

    def result(self) -> Outliers:
        """What the tokens so far show."""
        assert self.peaks is not None, "a pass has run"
        median = max(float(self.peaks.median()), torch.finfo(torch.float32).tiny)
        bins = self.peaks.tensor_split(min(BINS, len(self.peaks)))
        peak = float(self.peaks.max()) / median
        return Outliers(self.kurtosis / self.tokens, peak, tuple(float(f"{float(b.max()):.4g}") for b in bins))
