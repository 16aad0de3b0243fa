"""What holds while a model trains, whoever takes the steps: slimtune's trainer, or a loop of one's own.

Nothing here imports a trainer (transformers' brings `datasets` and pandas along, some 80 MB of memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from slimtune.arch import bind
from slimtune.calib.cpu import cpu_kernels
from slimtune.lora.attach import base_of, quantized, side_by_side
from slimtune.quant.decoding import kept_weights
from slimtune.train.options import TrainOptions


@contextmanager
def for_training(model: nn.Module, options: TrainOptions) -> Iterator[None]:
    """What holds while a model trains, and not before or after."""
    scopes = [quantized(model)]
    if options.gradient_checkpointing:  # then one block's are kept at a time
        blocks = base_of(model)
        scopes = [quantized(blocks.get_submodule(block.name)) for block in bind(model).blocks]
    with ExitStack() as stack:
        for part in (_without_cache(model), _same_flags(model), cpu_kernels(base_of(model)), side_by_side(model)):
            stack.enter_context(part)
        stack.enter_context(kept_weights(scopes, options.keep_decoded * 10**6))
        yield


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """What requires a gradient before the block does so after it: an optimizer may freeze factors for its own time."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache in the block, where packed rows could not be told apart; transformers' trainer would leave it
    off in the model's config for good."""
    config = cast(Any, model).config.get_text_config()
    before = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
