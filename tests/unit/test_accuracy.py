"""Classification, text to text: GLUE's rows in T5's words, and the likeliest of a few replies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pico import pico_model, pico_tokenizer
from slimtune.calib.formats import detect_format, normalise
from slimtune.errors import CalibrationError
from slimtune.evaluate.accuracy import _likelihood, accuracy

ROWS = [
    ({"sentence": "fine .", "label": "1"}, "sst2 sentence: fine .", "positive"),
    ({"source": "x", "label": "0", "star": "*", "sentence": "Him ran."}, "cola sentence: Him ran.", "unacceptable"),
    (
        {"Quality": "1", "#1 ID": "3", "#2 ID": "4", "#1 String": "A b.", "#2 String": "B a."},
        "mrpc sentence1: A b. sentence2: B a.",
        "equivalent",
    ),
    (
        {"index": "0", "question": "Who?", "sentence": "He did.", "label": "entailment"},
        "qnli question: Who? sentence: He did.",
        "entailment",
    ),
    (
        {"label": "neutral", "premise": "It is.", "hypothesis": "It was."},
        "mnli premise: It is. hypothesis: It was.",
        "neutral",
    ),
]


@pytest.mark.parametrize(("row", "prompt", "reply"), ROWS, ids=lambda value: str(value)[:12])
def test_rows_of_glue_are_known_by_their_columns(row: dict[str, str], prompt: str, reply: str) -> None:
    [conversation] = normalise([row])
    assert [message["content"] for message in conversation.messages] == [prompt, reply]
    assert detect_format([row]) == prompt.split()[0]


def test_a_label_without_a_word_is_refused() -> None:
    with pytest.raises(CalibrationError, match="'label' is '2'"):
        normalise([{"sentence": "fine", "label": "1"}, {"sentence": "fine", "label": "2"}])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_likelihood_is_the_models_own(family: str) -> None:
    """Of each row by itself, without padding, token by token."""
    model: Any = pico_model(family)
    tokenizer, reply = pico_tokenizer(), "yes"
    prompts = ["short", "a longer prompt than that"]
    with torch.no_grad():
        got = _likelihood(model, tokenizer, prompts, reply)
        answer = tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id]
        for prompt, value in zip(prompts, got.tolist(), strict=True):
            ids = tokenizer(prompt)["input_ids"]
            if family == "t5":
                inputs = torch.tensor([[*ids, tokenizer.eos_token_id]])
                loss = model(input_ids=inputs, labels=torch.tensor([answer])).loss
            else:
                labels = [-100] * len(ids) + answer
                loss = model(input_ids=torch.tensor([ids + answer]), labels=torch.tensor([labels])).loss
            assert value == pytest.approx(-float(loss) * len(answer), rel=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_likeliest_reply_is_the_answer(family: str) -> None:
    model, tokenizer = pico_model(family), pico_tokenizer()
    prompts, replies = [f"row {i}" for i in range(5)], ["no", "yes", "maybe"]
    tokenizer.chat_template = None
    with torch.no_grad():
        scores = torch.stack([_likelihood(model, tokenizer, prompts, reply) for reply in replies], 1)
    best = [replies[i] for i in scores.argmax(1).tolist()]
    wrong = [next(reply for reply in replies if reply != answer) for answer in best]
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, best, strict=True)]
    rows += [{"prompt": p, "completion": c} for p, c in zip(prompts[:3], wrong, strict=False)]
    rows += [{"prompt": "row 0", "completion": reply} for reply in replies]  # one of them is right
    found = accuracy(model, tokenizer, normalise(rows), batch_size=4)
    assert found.value == pytest.approx((5 + 1) / 11)
    assert found.samples == 11 and set(found.replies) == set(replies)
    assert not model.training


def test_what_is_no_classification_is_refused() -> None:
    model, tokenizer = pico_model("t5"), pico_tokenizer()
    many = normalise([{"prompt": "p", "completion": str(i)} for i in range(40)])
    with pytest.raises(CalibrationError, match="classes"):
        accuracy(model, tokenizer, many)
    with pytest.raises(CalibrationError, match="classes"):
        accuracy(model, tokenizer, [])
    with pytest.raises(CalibrationError, match="no prompt"):
        accuracy(model, tokenizer, normalise([{"text": "running"}]))
