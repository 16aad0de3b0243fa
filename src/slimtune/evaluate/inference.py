"""What every measurement asks of a model: run it without training it, and within the positions it knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from slimtune.calib.cpu import cpu_kernels
from slimtune.errors import CalibrationError, RecipeError
from slimtune.lora.attach import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; afterwards every module is in the mode it was in.

    `torch.no_grad` and not `torch.inference_mode`: a tensor that a module caches in the block may be trained on later.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def running(model: PreTrainedModel) -> Iterator[None]:
    """`inference`, with what makes a model faster on a CPU: for more than a token, since to enter it takes a while."""
    with inference(model), cpu_kernels(base_of(model)):
        yield


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values in a model's output, by the name under which the model takes them back.

    That is `cache` since transformers 5.24, and was `past_key_values` before.
    """
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def require_positions(model: PreTrainedModel, wanted: int, where: str) -> None:
    """Raise `RecipeError` where `wanted` tokens are more than the model's `max_position_embeddings`.

    A model whose config has no such limit (T5's positions are relative) takes any number.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise RecipeError(
            "more tokens than the model has positions for",
            where=where,
            got=wanted,
            wanted=f"at most {limit}",
            remedy="ask for fewer tokens",
        )


def require_vocabulary(model: PreTrainedModel, tokens: torch.Tensor, where: str) -> None:
    """Raise `CalibrationError` where one of `tokens` is none of the model's."""
    low, high = (int(bound) for bound in tokens.aminmax())
    vocabulary = model.config.get_text_config().vocab_size
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            "a token is not in the model's vocabulary",
            where=where,
            got=low if low < 0 else high,
            wanted=f"0 to {vocabulary - 1}",
            remedy="tokenize the text with the model's own tokenizer",
        )
