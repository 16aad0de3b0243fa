"""From rows to conversations: the formats fine-tuning data comes in, and the one form they all become.

| format | columns |
|---|---|
| messages | `messages`: a list of `{role, content}`, role one of system, user, assistant |
| sharegpt | `conversations`: a list of `{from, value}`, from one of system, human, gpt (or user, assistant) |
| alpaca | `instruction`, `output`, and perhaps `input` |
| prompt-completion | `prompt`, `completion` |
| sst2, cola, mrpc, qnli, mnli | the columns of GLUE's files (`slimtune.calib.glue`) |
| text | `text` |

A tokenizer with a chat template renders a conversation's `messages`. Without one (a base model), or for text, which is
nobody's turn, its `plain` segments are the text: Stanford Alpaca's own wording for alpaca rows, the prompt followed by
the completion as they are, or `### User:` headings over turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from slimtune.calib.glue import TASKS, Task
from slimtune.errors import CalibrationError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# Taori et al., Stanford Alpaca (2023), train.py: models tuned on Alpaca data know these two wordings.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of plain text, and whether it is what the model should learn to write."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Conversation:
    """One row in the common form: turns for a chat template (none for text), and the same as plain segments."""

    messages: tuple[Message, ...]
    plain: tuple[Segment, ...]

    @property
    def is_text(self) -> bool:
        """Whether this is running text, with no prompt and no reply."""
        return not self.messages


def detect_format(rows: Sequence[Mapping[str, Any]], where: str = "") -> str:
    """The name of the format `rows` are in, judged by the columns of the first row.

    >>> detect_format([{"instruction": "Add 1 and 1.", "input": "", "output": "2"}])
    'alpaca'
    """
    if not rows:
        raise CalibrationError("no rows", where=where, wanted="at least one row")
    for name, (columns, _) in FORMATS.items():
        if all(column in rows[0] for column in columns):
            return name
    raise CalibrationError(
        "rows in no known format",
        where=where,
        got=f"columns {', '.join(rows[0])}; first row {_short(rows[0])}",
        wanted="; ".join(f"{name}: {', '.join(columns)}" for name, (columns, _) in FORMATS.items()),
        remedy="rename the columns to those of one format",
    )


def normalise(rows: Sequence[Mapping[str, Any]], format: str | None = None, where: str = "") -> list[Conversation]:
    """The conversations of `rows`, one each, in order. `format` is detected if not given; `where` names the source.

    Raises `CalibrationError` for an unknown format and for a row without its fields or with one of a wrong type: the
    message has the row's number, counted from 1.

    >>> [conversation] = normalise([{"prompt": "1 + 1 =", "completion": " 2"}])
    >>> conversation.messages
    ({'role': 'user', 'content': '1 + 1 ='}, {'role': 'assistant', 'content': ' 2'})
    """
    format = detect_format(rows, where) if format is None else format
    if format not in FORMATS:
        raise CalibrationError("no such data format", where=where, got=format, remedy=nearest(format, FORMATS))
    columns, conversation = FORMATS[format]
    conversations = []
    for number, row in enumerate(rows, 1):
        try:
            conversations.append(conversation(row))
        except _BadField as bad:
            raise CalibrationError(
                f"a row does not fit the format {format}: {bad}",
                where=row_name(where, number),
                got=f"fields {', '.join(map(str, row)) or 'none'}; row {_short(row)}",
                wanted=", ".join(columns),
            ) from bad
    return conversations


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str = "") -> str:
    """The text a model reads for `conversation`: through the tokenizer's chat template if it has one, else plain.

    In plain form the tokenizer's end-of-sequence token follows every learnt segment. Beginning-of-sequence tokens are
    the template's affair, or the tokenizer's. Raises `CalibrationError` if the template refuses the conversation.
    """
    if uses_template(conversation, tokenizer):
        return render_messages(conversation.messages, tokenizer, where=where)
    return "".join(plain_text(segment, tokenizer) for segment in conversation.plain)


def uses_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template renders `conversation`."""
    return bool(tokenizer.chat_template) and not conversation.is_text


def render_messages(
    messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase, *, open_reply: bool = False, where: str = ""
) -> str:
    """`messages` through the chat template; with `open_reply`, up to where an assistant's reply would begin."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_reply)
    except TemplateError as error:
        raise CalibrationError(
            "the tokenizer's chat template refuses a conversation",
            where=where,
            got=error.message,
            remedy="change the row (order of roles, system message), or train a model with another template",
        ) from error
    assert isinstance(text, str)
    return text


def plain_text(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a plain segment: a learnt one is closed by the end-of-sequence token, if the tokenizer has one."""
    return segment.text + (tokenizer.eos_token or "") if segment.learnt else segment.text


def row_name(where: str, number: int) -> str:
    """How messages name a row: `row_name("a.jsonl", 3)` is `a.jsonl, row 3`."""
    return f"{where}, row {number}" if where else f"row {number}"


class _BadField(Exception):
    """What is wrong with a field of a row; `normalise` says which row."""


def _string(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise _BadField(f"no field '{name}'")
    if not isinstance(row[name], str):
        raise _BadField(f"'{name}' is {type(row[name]).__name__}, not a string")
    value: str = row[name]
    return value


def _from_messages(row: Mapping[str, Any]) -> Conversation:
    return _from_turns(row, "messages", "role", "content", {role: role for role in ROLES})


def _from_sharegpt(row: Mapping[str, Any]) -> Conversation:
    return _from_turns(row, "conversations", "from", "value", SHAREGPT_ROLES)


def _from_turns(row: Mapping[str, Any], column: str, who: str, what: str, roles: Mapping[str, str]) -> Conversation:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _BadField(f"'{column}' is not a list of objects with '{who}' and '{what}'")
    messages = []
    for turn in turns:
        speaker = _string(turn, who)
        if speaker not in roles:
            raise _BadField(f"unknown '{who}': {speaker} (known: {', '.join(roles)})")
        messages.append({"role": roles[speaker], "content": _string(turn, what)})
    return Conversation(tuple(messages), tuple(segment for message in messages for segment in _headed(message)))


def _headed(message: Message) -> tuple[Segment, ...]:
    """A turn in plain form: its text below its speaker's name."""
    heading, text = f"### {message['role'].capitalize()}:\n", message["content"]
    if message["role"] == "assistant":
        return Segment(heading, False), Segment(text, True)
    return (Segment(f"{heading}{text}\n\n", False),)


def _from_alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    context = _string(row, "input") if row.get("input") is not None else ""  # optional: absent and null are the same
    wording = ALPACA_INPUT if context else ALPACA
    return Conversation(
        _exchange(f"{instruction}\n\n{context}" if context else instruction, output),
        (Segment(wording.format(instruction=instruction, input=context), False), Segment(output, True)),
    )


def _from_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    return Conversation(_exchange(prompt, completion), (Segment(prompt, False), Segment(completion, True)))


def _from_glue(task: Task) -> Callable[[Mapping[str, Any]], Conversation]:
    def conversation(row: Mapping[str, Any]) -> Conversation:
        prompt = task.prompt
        for name in task.columns:
            prompt = prompt.replace(f"{{{name}}}", str(row.get(name, "")).strip())
        label = str(row.get(task.label, ""))
        if not label or (task.words and label not in task.words):
            raise _BadField(f"'{task.label}' is {label!r}")
        return _from_prompt_completion({"prompt": prompt, "completion": task.words.get(label, label)})

    return conversation


def _from_text(row: Mapping[str, Any]) -> Conversation:
    return Conversation((), (Segment(_string(row, "text"), True),))


def _exchange(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _short(row: Mapping[str, Any], longest: int = 200) -> str:
    text = repr(dict(row))
    return text if len(text) <= longest else text[:longest] + "..."


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Conversation]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "prompt-completion": (("prompt", "completion"), _from_prompt_completion),
    **{name: (task.columns, _from_glue(task)) for name, task in TASKS.items()},
    "text": (("text",), _from_text),
}
"""Per format: the columns it is recognised by, and how a row becomes a conversation. The first that fits is taken."""
