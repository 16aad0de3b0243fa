"""Text from a model, a piece at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimtune.arch.weights import require_logits
from slimtune.calib.cpu import cpu_kernels
from slimtune.errors import RecipeError
from slimtune.evaluate.inference import cache_of, inference, require_positions
from slimtune.evaluate.packed_cache import packed_cache
from slimtune.lora.attach import base_of
from slimtune.quant.decoding import decoding


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one, or by chance.

    Raises `RecipeError` for values out of range.
    """

    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest token; above: the larger, the freer"})
    top_p: float = field(default=1.0, metadata={"help": "choose among the fewest tokens of this probability together"})
    seed: int = field(default=0, metadata={"help": "of chance"})

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError("temperature out of range", where="temperature", got=self.temperature, wanted="0 or more")
        if not 0 < self.top_p <= 1:
            raise RecipeError("top_p out of range", where="top_p", got=self.top_p, wanted="above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise RecipeError("seed out of range", where="seed", got=self.seed, wanted="0 or more")


GREEDY = Sampling()


@dataclass(frozen=True)
class Pace:
    """How long a reply took: seconds to the first token (reading the prompt, mostly), and for those after it."""

    prompt_tokens: int
    new_tokens: int
    first: float
    rest: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read a second."""
        return self.prompt_tokens / max(self.first, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens written a second after the first; 0 where there was one at most."""
        return max(self.new_tokens - 1, 0) / max(self.rest, 1e-9)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, given the logits `[vocabulary]`.

    By chance, tokens are drawn from `softmax(logits / temperature)`, cut to the smallest set of the likeliest ones
    whose probabilities reach `top_p` (nucleus sampling, arXiv 1904.09751). `generator` is a CPU one, so that a seed
    says the same on every device.

    Example:
        >>> choose(torch.tensor([0.0, 3.0, 1.0]), Sampling(), torch.Generator())
        1
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    share, order = (logits.double() / sampling.temperature).softmax(-1).cpu().sort(descending=True, stable=True)
    before = share.cumsum(-1) - share
    share[before >= sampling.top_p] = 0  # the likeliest always stays: nothing is before it
    return int(order[torch.multinomial(share, 1, generator=generator)])


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """The continuation of `inputs["input_ids"]` (`[1, n]`; an encoder-decoder: its answer to them): the text that each
    new token adds, until the end of sequence, `max_new_tokens`, or the model's last position.

    A token that is only part of a character adds "". Raises `RecipeError` where the prompt is longer than the model,
    and `FormatError` where that computes no numbers.
    """
    ids, generator = inputs["input_ids"].to(model.device), torch.Generator().manual_seed(sampling.seed)
    carried: dict[str, Any] = {"logits_to_keep": 1}
    name, positions = "input_ids", getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if model.config.is_encoder_decoder:
        name, positions = "decoder_input_ids", None
        with inference(model):
            carried = {"encoder_outputs": model.get_encoder()(input_ids=ids)}
        ids = ids.new_tensor([[model.config.decoder_start_token_id]])
    else:
        require_positions(model, ids.shape[1] + 1, "the prompt and one token")
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - ids.shape[1])
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    cache: dict[str, Any] = packed_cache(model)
    new, shown = [], ""
    for _ in range(room):
        with inference(model):  # for each token: what is done with a piece is not the model's to decide
            output = model(**{name: ids}, **carried, **cache, use_cache=True)
        cache = cache_of(output)
        require_logits(model, output.logits[0, -1])
        token = choose(output.logits[0, -1], sampling, generator)
        if token in stops:
            break
        ids = ids.new_tensor([[token]])
        new.append(token)
        text = str(tokenizer.decode(new))
        whole = shown if text.endswith("\N{REPLACEMENT CHARACTER}") else text
        yield whole[len(shown) :]
        shown = whole


def write_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], None],
) -> Pace:
    """`stream`, each piece given to `write` as it comes; returns how long it took.

    Packed layers are prepared for it first (`slimtune.quant.decoding`): on a CPU they write in bfloat16.
    """
    if max_new_tokens < 1:
        raise RecipeError("nothing to write", where="max_new_tokens", got=max_new_tokens, wanted="1 or more")
    with decoding(model), cpu_kernels(base_of(model)):
        start = time.perf_counter()
        times = [start]
        for piece in stream(model, tokenizer, inputs, max_new_tokens, sampling):
            times.append(time.perf_counter())
            write(piece)
    if len(times) == 1:  # the reply was its end: the prompt was read all the same
        times.append(time.perf_counter())
        return Pace(inputs["input_ids"].shape[1], 0, times[1] - start, 0.0)
    return Pace(inputs["input_ids"].shape[1], len(times) - 1, times[1] - start, times[-1] - times[1])
