"""How much is pruned at a moment of training."""

from __future__ import annotations

from slimtune.prune.options import PruneOptions


def ratio_at(options: PruneOptions, step: int, steps: int) -> float:
    """The share of parameters to be gone after `step` of `steps` training steps.

    Nothing during the warm-up, all of `options.ratio` from the cool-down on, and between them a line or the cubic
    `r - r (1 - p)³` (Zhu and Gupta, arXiv 1710.01878), which prunes fastest while there is most to spare.

    >>> ratio_at(PruneOptions(ratio=0.5, schedule="linear", warmup=0.0, cooldown=0.5), 25, 100)
    0.25
    """
    begin, end = options.warmup * steps, (1 - options.cooldown) * steps
    progress = min(max((step - begin) / max(end - begin, 1e-9), 0.0), 1.0)
    return options.ratio * (progress if options.schedule == "linear" else 1 - (1 - progress) ** 3)


def ends_at(options: PruneOptions, steps: int) -> int:
    """The first training step after which the ramp is over."""
    return next(
        step for step in range(1, steps + 1) if step == steps or ratio_at(options, step, steps) >= options.ratio
    )
