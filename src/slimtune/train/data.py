"""From conversations to training batches: tokens, loss masks, packing, padding.

What is learnt is decided on the text, not on the tokens: a rendered conversation comes with the character spans of the
assistant's turns, it is tokenised once, as the model will see it, and a token with a character in a span gets a label.
Tokenising the turns apart and joining them would give other tokens at the seams.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slimtune.calib.data import CHUNK
from slimtune.calib.formats import Conversation, plain_text, render, render_messages, row_name, uses_template
from slimtune.errors import CalibrationError, RecipeError, ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss: `torch.nn.functional.cross_entropy`'s own `ignore_index`."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Tokens and their labels. For a decoder the two have one length, and label i is token i or `IGNORED` (the model
    shifts them itself); for an encoder-decoder the labels are the tokens of the reply.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Packed(Example):
    """Several examples in one row; `position_ids` start at 0 again with each: so attention keeps them apart."""

    position_ids: list[int]


Facts = dict[str, int | str]


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    completion_only_loss: bool = True,
    where: str = "",
) -> tuple[list[Example], Facts]:
    """The examples of `conversations` for a decoder, and the facts of how they were made.

    With `completion_only_loss`, the assistant's turns (each with its end-of-turn token) are learnt; without, and for
    text, everything is. The first token never has a label: nothing predicts it. An example is cut at `max_length`
    tokens, except that a longer text becomes several examples; one without a label left is dropped.

    Facts: `rows`, `examples`, `dropped`, `truncated`, `tokens`, `trainable_tokens`, and `sample`, the first example's
    text with what is not learnt in «». Raises `CalibrationError` where no example is left, and `RecipeError` where
    spans cannot be found (a slow tokenizer, or a chat template that rewrites earlier turns as a conversation grows).
    """
    if completion_only_loss and not tokenizer.is_fast:
        raise RecipeError(
            "the loss mask needs the places of tokens in the text, which this tokenizer does not give",
            got=type(tokenizer).__name__,
            remedy="use a fast tokenizer, or set completion_only_loss: false",
        )
    examples: list[Example] = []
    truncated = dropped = 0
    for start in range(0, len(conversations), CHUNK):
        chunk = conversations[start : start + CHUNK]
        for conversation, example in zip(
            chunk, _whole(chunk, tokenizer, completion_only_loss, where, start), strict=True
        ):
            pieces = list(_pieces(example, max_length))
            if not conversation.is_text:
                truncated += len(pieces) > 1
                pieces = pieces[:1]
            learnable = [piece for piece in pieces if any(label != IGNORED for label in piece.labels)]
            dropped += not learnable
            examples += learnable
    facts = _facts(examples, len(conversations), dropped, truncated, where)
    return examples, {**facts, "sample": marked(examples[0], tokenizer)}


def tokenize_seq2seq(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, where: str = ""
) -> tuple[list[Example], Facts]:
    """The examples of `conversations` for an encoder-decoder: prompt in, reply out, each with its end of sequence.

    The reply is the last learnt turn, the prompt everything before it. Each is cut at `max_length`; a cut prompt keeps
    its end-of-sequence token, a cut reply has none, as it does not end there. Facts and errors as in `tokenize`, where
    `tokens` are those of the prompts and `trainable_tokens` those of the replies.
    """
    examples: list[Example] = []
    truncated = 0
    for number, conversation in enumerate(conversations, 1):
        prompt, reply = _prompt_and_reply(conversation, tokenizer, row_name(where, number))
        source, target = _ids(prompt, tokenizer), _ids(reply, tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        truncated += max(len(source + end), len(target)) > max_length
        if target:
            examples.append(Example(source[: max_length - len(end)] + end, target[:max_length]))
    facts = _facts(examples, len(conversations), len(conversations) - len(examples), truncated, where)
    first = examples[0]
    return examples, {**facts, "sample": f"«{tokenizer.decode(first.input_ids)}»{tokenizer.decode(first.labels)}"}


def pack(examples: Sequence[Example], max_length: int) -> list[Packed]:
    """`examples` in as few rows of `max_length` tokens as best-fit-decreasing finds: at most 11/9 of the fewest.

    Deterministic. Rows and the examples within a row keep the order of `examples` (a row stands where its first example
    stood). Raises `ShapeError` for an example longer than a row.

    >>> pack([Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [-100, 5])], 8)
    [Packed(input_ids=[1, 2, 3, 4, 5], labels=[-100, 2, 3, -100, 5], position_ids=[0, 1, 2, 0, 1])]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids)):
        length = len(examples[index].input_ids)
        if length > max_length:
            raise ShapeError("an example is longer than a packed row", got=length, wanted=f"at most {max_length}")
        tightest = bisect_left(room, (length, -1))
        if tightest == len(room):
            rows.append([])
            room.append((max_length, len(rows) - 1))
        free, row = room.pop(tightest)
        rows[row].append(index)
        insort(room, (free - length, row))
    return [_row([examples[i] for i in row]) for row in sorted(sorted(row) for row in rows)]


@dataclass(frozen=True)
class Collator:
    """A batch from examples: each field padded on the right to the longest in the batch, rounded up to `multiple_of`.

    Labels are padded with `IGNORED`. Plain examples get an `attention_mask`. Packed ones get `position_ids` instead,
    and the padding positions of its own, from 0: transformers finds the borders there only where there is neither a
    mask nor a cache; so the model needs `config.use_cache = False`. All values are int64 `[batch, length]`.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The batch of `examples`, which are all packed or all not."""
        batch = {
            "input_ids": self._padded([example.input_ids for example in examples], self.pad_token_id),
            "labels": self._padded([example.labels for example in examples], IGNORED),
        }
        width = batch["input_ids"].shape[1]
        positions = [
            example.position_ids + list(range(width - len(example.position_ids)))
            for example in examples
            if isinstance(example, Packed)
        ]
        if positions:
            assert len(positions) == len(examples), "packed and other examples in one batch"
            return batch | {"position_ids": torch.tensor(positions)}
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        return batch | {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}

    def _padded(self, rows: list[list[int]], value: int) -> torch.Tensor:
        width = -(-max(map(len, rows)) // self.multiple_of) * self.multiple_of
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else its end of sequence, else 0. No loss and no token sees it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example of a decoder, with the tokens that have no label in «»."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        learnt = label != IGNORED
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token)
    texts = [(learnt, tokenizer.decode(ids)) for learnt, ids in runs]
    return "".join(str(text) if learnt else f"«{text}»" for learnt, text in texts)


# Text and what of it is learnt


def _whole(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, masked: bool, where: str, before: int
) -> Iterator[Example]:
    """One example each, of any length. `before` rows stand before the first of `conversations`."""
    texts, spans = [], []
    for number, conversation in enumerate(conversations, before + 1):
        name = row_name(where, number)
        text = render(conversation, tokenizer, name)
        texts.append(text)
        spans.append(_learnt_spans(conversation, tokenizer, text, name) if masked else [])
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=masked, verbose=False
    )
    begin = _beginning(tokenizer)
    for i, conversation in enumerate(conversations):
        ids = encoded["input_ids"][i]
        labels = ids if not masked else _labels(ids, encoded["offset_mapping"][i], spans[i])
        if not uses_template(conversation, tokenizer):  # a template writes its own
            ids, labels = begin + ids, [IGNORED] * len(begin) + labels
        yield Example(ids, labels)


def _learnt_spans(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[Span]:
    """The character spans of `text` that are learnt: a reply begins where the template would have the model begin."""
    if not uses_template(conversation, tokenizer):
        return list(_plain_spans(conversation, tokenizer))
    messages, spans = conversation.messages, []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render_messages(messages[:i], tokenizer, open_reply=True, where=where)
            last = i + 1 == len(messages)
            through = text if last else render_messages(messages[: i + 1], tokenizer, where=where)
            if not (through.startswith(before) and text.startswith(through)):
                raise RecipeError(
                    "the chat template is not prefix-stable: a longer conversation does not begin with the shorter, "
                    "so the assistant's turns cannot be found in it",
                    where=f"{where}, message {i + 1}",
                    got=f"...{before[-60:]!r}, then {through[: len(before)][-60:]!r}",
                    remedy="set completion_only_loss: false, or give one turn per row",
                )
            spans.append((len(before), len(through)))
    return spans


def _plain_spans(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    end = 0
    for segment in conversation.plain:
        begin, end = end, end + len(plain_text(segment, tokenizer))
        if segment.learnt:
            yield begin, end


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """Token i where a character of it lies in a span, else `IGNORED`; one without characters is its place's."""

    def learnt(begin: int, end: int) -> bool:
        return any(begin < stop and max(end, begin + 1) > start for start, stop in spans)

    return [token if learnt(*offset) else IGNORED for token, offset in zip(ids, offsets, strict=True)]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before every text."""
    added: list[int] = tokenizer("")["input_ids"]
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def _pieces(example: Example, length: int) -> Iterator[Example]:
    """Stretches of at most `length` tokens; nothing predicts the first token of each."""
    for start in range(0, len(example.input_ids), length):
        ids, labels = example.input_ids[start : start + length], example.labels[start : start + length]
        yield Example(ids, [IGNORED, *labels[1:]])


def _prompt_and_reply(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    if conversation.is_text:
        raise CalibrationError(
            "an encoder-decoder model needs a prompt and a reply", where=where, got="text", remedy="give rows with both"
        )
    replies = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    last = replies[-1] if replies else len(conversation.messages)
    if uses_template(conversation, tokenizer):
        prompt = render_messages(conversation.messages[:last], tokenizer, open_reply=True, where=where)
    else:
        learnt = [i for i, segment in enumerate(conversation.plain) if segment.learnt]
        prompt = "".join(segment.text for segment in conversation.plain[: learnt[-1] if learnt else None])
    reply = conversation.messages[last]["content"] + (tokenizer.eos_token or "") if replies else ""
    return prompt, reply


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _row(examples: list[Example]) -> Packed:
    return Packed(
        [token for example in examples for token in example.input_ids],
        [label for example in examples for label in [IGNORED, *example.labels[1:]]],
        [position for example in examples for position in range(len(example.input_ids))],
    )


def _facts(examples: list[Example], rows: int, dropped: int, truncated: int, where: str) -> dict[str, int]:
    if not examples:
        raise CalibrationError(
            "no training example has a token to learn",
            where=where,
            got=f"{rows} rows, {truncated} of them cut",
            remedy="raise max_length, or give rows with an assistant's reply",
        )
    return {
        "rows": rows,
        "examples": len(examples),
        "dropped": dropped,
        "truncated": truncated,
        "tokens": sum(len(example.input_ids) for example in examples),
        "trainable_tokens": sum(label != IGNORED for example in examples for label in example.labels),
    }
