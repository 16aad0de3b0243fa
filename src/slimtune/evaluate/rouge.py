"""ROUGE of what a model writes: how much of the reference's words and word pairs a reply has, for summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from slimtune.calib.formats import Conversation
from slimtune.errors import BackendMissing, CalibrationError
from slimtune.evaluate.inference import require_positions, running
from slimtune.evaluate.rows import prompt_and_reply
from slimtune.quant.decoding import decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    where: str = "",
) -> dict[str, float]:
    """Mean F1 (0 to 1) of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) over rows of one prompt and one reply.

    Replies are the likeliest token after the likeliest token, to the end of sequence or `max_new_tokens`; words are
    stemmed, as is usual for summaries. Scored by Google's `rouge-score`.

    Raises `BackendMissing` without it, `CalibrationError` for a row without a reply and where there is none,
    `RecipeError` where prompt and reply are longer than the model.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BackendMissing("rouge-score is not installed", remedy="pip install 'slimtune[eval]'") from error
    pairs = [prompt_and_reply(conversation, tokenizer, where) for conversation in conversations]
    if not pairs:
        raise CalibrationError("there is no row to compare with", where=where)
    scorer, totals = RougeScorer(KINDS, use_stemmer=True), dict.fromkeys(KINDS, 0.0)
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        written = replies(model, tokenizer, [prompt for prompt, _ in chunk], max_new_tokens, where)
        for (_, reference), text in zip(chunk, written, strict=True):
            for kind, score in scorer.score(reference, text).items():
                totals[kind] += score.fmeasure
    return {kind: total / len(pairs) for kind, total in totals.items()}


def replies(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, where: str = "") -> list[str]:
    """What `model`, a decoder or an encoder-decoder, writes after each prompt, greedily."""
    device = next(model.parameters()).device
    ends = [tokenizer.eos_token_id] if model.config.is_encoder_decoder else []
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] + ends for prompt in prompts]
    width = max(map(len, rows))
    if not model.config.is_encoder_decoder:
        require_positions(model, width + max_new_tokens, where or "prompt and reply")
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    with running(model), decoding(model):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=filler,
        )
    start = 0 if model.config.is_encoder_decoder else width
    return [str(text) for text in tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)]
