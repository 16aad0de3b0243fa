"""Speed of a model: how fast it reads a prompt, and how fast it writes after it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slimtune.errors import RecipeError
from slimtune.evaluate.inference import cache_of, require_positions, running
from slimtune.quant.decoding import decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch size 1, each the median of the repeats, and the sizes they were measured at."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int


def speed(model: PreTrainedModel, *, prompt_tokens: int = 512, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Time `model` on one random prompt of `prompt_tokens`, then `new_tokens` greedy steps with the key-value cache.

    Prefill is the time to the first token: the whole prompt read once and one token chosen (an encoder-decoder model
    runs its encoder on the prompt and its decoder on one token). Decode is the steps after that, one token in and one
    out each. A first run warms up and is not counted. The loop is written out, without `generate`, so that the time is
    the model's. The prompt is the same in every call.

    Raises `RecipeError` for a count below 1, or more tokens than the model has positions for.
    """
    for name, count in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if count < 1:
            raise RecipeError("nothing to time", where=f"speed: {name}", got=count, wanted="1 or more")
    require_positions(model, prompt_tokens + new_tokens, "speed: prompt_tokens + new_tokens")
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    with running(model), decoding(model):
        _times(model, prompt, new_tokens)
        times = [_times(model, prompt, new_tokens) for _ in range(repeats)]
    prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
    return Speed(prompt_tokens / prefill, new_tokens / decode, prompt_tokens, new_tokens)


def _times(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of all decode steps. Reading a token back (`item`) waits for the device."""
    start = time.perf_counter()
    if model.config.is_encoder_decoder:
        output = model(input_ids=prompt, decoder_input_ids=prompt[:, :1], use_cache=True)
        name, carried = "decoder_input_ids", {"encoder_outputs": (output.encoder_last_hidden_state,)}
    else:  # only the last row of logits, as in generation
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        name, carried = "input_ids", {}
    token = output.logits[:, -1:].argmax(-1)
    token.item()
    middle = time.perf_counter()
    for _ in range(new_tokens):
        output = model(**{name: token}, **cache_of(output), use_cache=True, **carried)
        token = output.logits[:, -1:].argmax(-1)
    token.item()
    return middle - start, time.perf_counter() - middle
