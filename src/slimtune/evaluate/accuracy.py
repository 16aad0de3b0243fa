"""How often a model's likeliest reply is the right one, where replies are few: classification, text to text.

The candidates are the different replies of the rows; the answer is the one of highest log-likelihood as a whole, its
end of sequence included. Nothing is generated, so a model that has not learnt the form yet is scored all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from slimtune.calib.formats import Conversation
from slimtune.errors import CalibrationError
from slimtune.evaluate.inference import running
from slimtune.evaluate.rows import prompt_and_reply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST = 32
"""Different replies that count as a classification."""


@dataclass(frozen=True)
class Accuracy:
    """The share of rows answered rightly, and the share of the commonest reply, which is the least to beat."""

    value: float
    majority: float
    samples: int
    replies: tuple[str, ...]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 16,
    where: str = "",
) -> Accuracy:
    """Accuracy of `model`, a decoder or an encoder-decoder, on rows of one prompt and one reply.

    Raises `CalibrationError` where there is no row, a row has no reply, or the replies are too many to be classes.
    """
    pairs = [prompt_and_reply(conversation, tokenizer, where) for conversation in conversations]
    counts = Counter(reply for _, reply in pairs)
    if not 2 <= len(counts) <= MOST:
        raise CalibrationError(
            "accuracy needs rows whose replies are classes",
            where=where,
            got=f"{len(counts)} different replies in {len(pairs)} rows",
            wanted=f"2 to {MOST}",
        )
    replies = sorted(counts)
    right = 0
    with running(model):
        for start in range(0, len(pairs), batch_size):
            chunk = pairs[start : start + batch_size]
            scores = torch.stack([_likelihood(model, tokenizer, [p for p, _ in chunk], reply) for reply in replies], 1)
            right += sum(
                replies[best] == reply for best, (_, reply) in zip(scores.argmax(1).tolist(), chunk, strict=True)
            )
    return Accuracy(right / len(pairs), max(counts.values()) / len(pairs), len(pairs), tuple(replies))


def _likelihood(model: Any, tokenizer: Any, prompts: list[str], reply: str) -> Tensor:
    """The log-likelihood of `reply` after each prompt, float32 `[prompts]`."""
    device = next(model.parameters()).device
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer: list[int] = tokenizer(reply, add_special_tokens=False)["input_ids"] + end
    sources: list[list[int]] = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    two_sided = model.config.is_encoder_decoder
    rows = [source + (end if two_sided else answer) for source in sources]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    if two_sided:
        labels = torch.tensor([answer] * len(rows), device=device)
        log_p = log_softmax(model(input_ids=ids, attention_mask=mask, labels=labels).logits.float(), -1)
        return log_p.gather(2, labels[:, :, None]).sum((1, 2))
    log_p = log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), -1)
    found = log_p[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    learnt = torch.zeros_like(found)
    for row, source in enumerate(sources):
        learnt[row, len(source) - 1 : len(source) - 1 + len(answer)] = 1
    return (found * learnt).sum(1)
