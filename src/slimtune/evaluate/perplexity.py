"""Perplexity per token of a text, as in the quantization papers: non-overlapping windows of the whole text.

Example: a model whose logits are all equal is as perplexed as its vocabulary is large.
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, num_key_value_heads=1))
    >>> _ = model.lm_head.weight.data.zero_()
    >>> result = perplexity(model, torch.arange(10) % 16, length=4)
    >>> round(result.value, 4), result.tokens, result.windows
    (16.0, 7, 3)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from slimtune.errors import CalibrationError, RecipeError, ShapeError
from slimtune.evaluate.inference import require_positions, require_vocabulary, running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256  # rows of logits in float32 at a time: 256 rows of a vocabulary of 128k are 128 MiB
IGNORED = -100  # the target that cross entropy gives no loss


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    `value` is exp(loss), at most the largest finite float (so that it can stand in JSON); `loss` is the mean negative
    log-likelihood in nats over `tokens` predicted tokens; `windows` windows of at most `length` tokens were read.
    """

    value: float
    loss: float
    tokens: int
    length: int
    windows: int


def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    length: int = 512,
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Perplexity of `model` on `tokens`, int64 [n], the whole text as one sequence.

    The text is cut into windows of `length` tokens that do not overlap and do not see each other; in each, every token
    but the first is predicted. A shorter last window counts if it has two tokens or more. `batch_size` changes memory
    and speed, not the result: at most one batch's logits and `CHUNK` rows of them in float32 are held. Losses are
    summed in float64. `progress` is called with (windows done, windows) after each batch.

    Raises `RecipeError` for an encoder-decoder model, a `length` below 2 or above the model's positions, or a
    `batch_size` below 1; `ShapeError` for tokens that are not one sequence; `CalibrationError` for a text of fewer than
    two tokens, a token outside the vocabulary, or a loss that is not finite.
    """
    _require(model, tokens, length, batch_size)
    whole = tokens.numel() // length
    batches = list(tokens[: whole * length].view(whole, length).split(batch_size)) if whole else []
    rest = tokens[whole * length :]
    if rest.numel() >= 2:
        batches.append(rest[None])
    windows = sum(len(batch) for batch in batches)
    total, done = 0.0, 0
    with running(model):
        for batch in batches:
            total += _loss(model, batch.to(model.device, torch.long), first=done)
            done += len(batch)
            if progress is not None:
                progress(done, windows)
    predicted = sum(batch.numel() - len(batch) for batch in batches)
    loss = total / predicted
    value = math.exp(loss) if loss < math.log(sys.float_info.max) else sys.float_info.max
    return Perplexity(value, loss, predicted, length, windows)


def _loss(model: PreTrainedModel, windows: torch.Tensor, *, first: int) -> float:
    """Negative log-likelihood summed over windows [b, length]; `first` is the number of the first one, for messages."""
    logits = model(input_ids=windows, use_cache=False).logits.flatten(0, 1)
    # The last position has nothing to predict. An ignored target, and not a slice: a slice would copy the logits.
    targets = F.pad(windows[:, 1:], (0, 1), value=IGNORED).flatten()
    chunks = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    losses = [F.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="none") for rows, wanted in chunks]
    sums = torch.cat(losses).cpu().double().view(windows.shape).sum(1)
    broken = (~sums.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise CalibrationError(
            "the model's loss is not a finite number",
            where=f"window {first + broken[0]} of the text, counted from 0",
            got=sums[broken[0]].item(),
            remedy="a weight or the dtype is at fault: try dtype float32, or look at the step before this one",
        )
    return float(sums.sum())


def _require(model: PreTrainedModel, tokens: torch.Tensor, length: int, batch_size: int) -> None:
    where = "perplexity"
    if model.config.is_encoder_decoder:
        raise RecipeError(
            "perplexity of a text is a decoder's measure, and this model is an encoder-decoder",
            where=where,
            got=type(model).__name__,
            remedy="measure it on tasks instead",
        )
    if length < 2:
        raise RecipeError("a window must predict at least one token", where=where, got=length, wanted="length >= 2")
    if batch_size < 1:
        raise RecipeError("a batch must hold at least one window", where=where, got=batch_size, wanted=">= 1")
    require_positions(model, length, "perplexity: length")
    if tokens.dim() != 1:
        raise ShapeError("a text is one sequence of tokens", where=where, got=tuple(tokens.shape), wanted="(n,)")
    if tokens.numel() < 2:
        raise CalibrationError("a text needs two tokens or more", where=where, got=f"{tokens.numel()} tokens")
    require_vocabulary(model, tokens, where)
