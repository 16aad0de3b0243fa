"""What the unpruned model predicts for every example, found once and kept: its likeliest tokens, and the rest as one.

A teacher that is asked at every step costs a forward pass each time, and must be there until the end. What it said is a
file of `tokens x top_k` numbers: training then runs as fast as without a teacher, and the cut can come when the ramp is
over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax, pad

from slimtune.calib.loss import CHUNK, has_plain_head
from slimtune.errors import FormatError
from slimtune.files import whole_file
from slimtune.lora.attach import base_of
from slimtune.train.data import IGNORED, Collator, Example
from slimtune.train.options import TrainOptions

FILE = "teacher.safetensors"


class Top(NamedTuple):
    """The predictions of some tokens: `token` and `log_p` `[tokens, k]` of the likeliest, `rest` `[tokens]` the log of
    what all others have together."""

    token: Tensor
    log_p: Tensor
    rest: Tensor


def head_of(base: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The head of a Hugging Face model, weight `[vocabulary, features]` and bias; two times None where its logits are
    not simply what that makes."""
    if not has_plain_head(base):
        return None, None
    head: Any = cast(Any, base).get_output_embeddings()
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def logits_of(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What the head makes of `hidden`; itself where there is none."""
    return hidden if weight is None else linear(hidden, weight, bias)


def learnt_of(base: nn.Module, labels: Tensor) -> Tensor:
    """Where `[batch, length]` predicts a token that is learnt: a decoder alone predicts the next one."""
    if not cast(Any, base).config.is_encoder_decoder:
        labels = pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return labels != IGNORED


def top(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, k: int) -> Top:
    """The `k` likeliest tokens by the head (`weight` `[vocabulary, features]`, `bias`) for each row of `hidden`.

    >>> likeliest = top(torch.eye(2), torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]]), None, 1)
    >>> likeliest.token.tolist(), (likeliest.log_p[:, 0].exp() + likeliest.rest.exp()).round(decimals=3).tolist()
    ([[0], [1]], [1.0, 1.0])
    """
    made = []
    for rows in hidden.split(CHUNK):
        log_p = log_softmax(logits_of(rows, weight, bias), -1, dtype=torch.promote_types(rows.dtype, torch.float32))
        values, index = log_p.topk(k)
        made.append(Top(index, values, log_p.scatter(1, index, -math.inf).logsumexp(1)))
    return Top(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def visited(examples: Sequence[Example], options: TrainOptions, seed: int) -> Sequence[Example]:
    """The examples that so many steps look at: all, or as many as there is time for, by chance."""
    count = options.max_steps * options.gradient_accumulation_steps * options.per_device_train_batch_size
    if not 0 < count < len(examples):
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[row] for row in sorted(order[:count].tolist())]


class Teacher:
    """What was written to `path`, read a batch at a time."""

    def __init__(self, path: Path, base: nn.Module, examples: Sequence[Example], k: int) -> None:
        self._counts = [int(learnt_of(base, torch.tensor([example.labels])).sum()) for example in examples]
        try:
            self._file = safe_open(path, "pt")
            shape = self._file.get_slice("token").get_shape()
        except (SafetensorError, OSError) as error:
            raise FormatError("the teacher's predictions are damaged", where=str(path), remedy="delete it") from error
        if shape != [sum(self._counts), k]:
            raise FormatError("these predictions are of other data", where=str(path), remedy="delete it")
        starts = torch.tensor([0, *self._counts]).cumsum(0).tolist()
        self._spans = list(pairwise(starts))

    def of(self, rows: Sequence[int], device: torch.device) -> Top:
        """The predictions for the learnt tokens of these examples, one after the other."""
        parts = [self._file.get_slice(name) for name in Top._fields]
        read = (torch.cat([part[slice(*self._spans[row])] for row in rows]).to(device) for part in parts)
        index, log_p, rest = read
        return Top(index.long(), log_p, rest)


def write_teacher(
    path: Path,
    model: PeftModel,
    hidden_of: Callable[[dict[str, Any]], Tensor],
    examples: Sequence[Example],
    collator: Collator,
    k: int,
    batch_size: int,
) -> None:
    """Run the teacher over `examples` (`hidden_of` a batch: what it hands to its head), and write what it predicts."""
    base = base_of(model)
    device = next(base.parameters()).device

    def predictions() -> Iterator[Top]:
        for start in range(0, len(examples), batch_size):
            batch = {k: v.to(device) for k, v in collator(examples[start : start + batch_size]).items()}
            hidden = hidden_of(batch)
            yield top(hidden[learnt_of(base, batch["labels"])], *head_of(base, hidden.dtype), k)

    with torch.no_grad():
        index, log_p, rest = (torch.cat(parts).cpu() for parts in zip(*predictions(), strict=True))
    with whole_file(path) as partial:
        save_file({"token": index.int(), "log_p": log_p, "rest": rest}, partial)
