"""Text from a model, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Tensor], max_new_tokens: int
) -> Iterator[str]:
    """Greedy continuation of `inputs["input_ids"]` (`[1, n]`): the text each new token adds, until the end of sequence.

    Tokens that are only part of a character add nothing until it is whole.
    """
    ids = inputs["input_ids"].to(model.device)
    cache = None
    new: list[int] = []
    shown = ""
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    for _ in range(max_new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        if int(ids) in stops:
            break
        new.append(int(ids))
        text = str(tokenizer.decode(new))
        if text.endswith("�"):
            continue
        yield text[len(shown) :]
        shown = text
