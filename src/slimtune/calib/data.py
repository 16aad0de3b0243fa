"""From text to token batches for calibration and perplexity.

Calibration follows the field's way (GPTQ and its successors): documents are tokenised, joined into one long row of
tokens, and windows of equal length are cut out at random places.

Special tokens: a document gets those that the tokenizer itself adds to a text (Llama's beginning-of-sequence token,
T5's end-of-sequence token, nothing for GPT-2 or SmolLM2), and nothing else comes between two documents. A conversation
has those of its chat template, or in plain form the end-of-sequence token after each reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slimtune.calib.formats import normalise, render, row_name, uses_template
from slimtune.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # texts tokenised at a time: bounds what the tokenizer holds, and is enough for its threads


def calibration_tokens(
    data: str | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    where: str = "",
) -> torch.Tensor:
    """Calibration windows, int64 `[n, length]`, cut without overlap from the joined documents of `data`.

    `data` is one text, or rows in any format of `slimtune.calib.formats`; `where` names it in messages. `n` is
    `samples`, or as many windows as the data has tokens for: the shape tells. The places are drawn uniformly from all
    placements of `n` windows that do not overlap, by a CPU generator seeded with `seed`; nothing else is random, and
    the windows are in the order of the text. Raises `CalibrationError` where the data does not fill one window.
    """
    joined = _joined(data, tokenizer, where)
    n = min(samples, len(joined) // length)
    if n == 0:
        raise CalibrationError(
            "the calibration data is too short for one sample",
            where=where,
            got=f"{len(joined)} tokens",
            wanted=f"at least {length}",
            remedy="give more data or a smaller length",
        )
    # With every window shrunk to one token, a placement is a choice of n of the tokens that are left.
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(joined) - n * (length - 1), generator=generator)[:n].sort().values
    starts = places + torch.arange(n) * (length - 1)
    return joined[starts[:, None] + torch.arange(length)]


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The tokens of a text of any length, int64 `[n]`, without special tokens: what perplexity is measured on."""
    return torch.tensor(_ids([text], tokenizer, special=False)[0], dtype=torch.int64)


def _joined(data: str | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> torch.Tensor:
    conversations = normalise([{"text": data}] if isinstance(data, str) else data, where=where)
    texts = [
        conversation.plain[0].text if conversation.is_text else render(conversation, tokenizer, row_name(where, number))
        for number, conversation in enumerate(conversations, 1)
    ]
    # A source has one format: either every row went through the template, which writes its own special tokens, or none.
    special = not uses_template(conversations[0], tokenizer)
    chunks = [_ids(texts[start : start + CHUNK], tokenizer, special=special) for start in range(0, len(texts), CHUNK)]
    return torch.tensor([token for chunk in chunks for ids in chunk for token in ids], dtype=torch.int64)


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    # verbose=False: a text may be longer than the model reads at once; it is cut into windows afterwards.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids
