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
    """Greedy continuation of `inputs["input_ids"]` (`[1, n]`; an encoder-decoder: its answer to them): the text that
    each new token adds, until the end of sequence. A token that is only part of a character adds "".
    """
    ids = inputs["input_ids"].to(model.device)
    cache, encoded = None, {}
    if model.config.is_encoder_decoder:
        encoded = {"encoder_outputs": model.get_encoder()(input_ids=ids)}
        ids = ids.new_tensor([[model.config.decoder_start_token_id]])
    new: list[int] = []
    shown = ""
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    for _ in range(max_new_tokens):
        name = "decoder_input_ids" if encoded else "input_ids"
        output = model(**{name: ids}, **encoded, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        if int(ids) in stops:
            break
        new.append(int(ids))
        text = str(tokenizer.decode(new))
        whole = shown if text.endswith("\N{REPLACEMENT CHARACTER}") else text
        yield whole[len(shown) :]
        shown = whole
