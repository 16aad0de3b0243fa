"""The five formats become one form; a row that does not fit is named by its number."""

import pytest

from slimtune.calib.formats import FORMATS, Segment, detect_format, normalise
from slimtune.errors import CalibrationError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
EXAMPLES = {
    "messages": {"messages": [SYSTEM, USER, ASSISTANT]},
    "sharegpt": {
        "conversations": [{"from": f, "value": v} for f, v in (("system", "s"), ("human", "q"), ("gpt", "a"))]
    },
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "t"},
    "cola": {"sentence": "s", "label": "0", "star": "*"},
    "mrpc": {"#1 String": "s", "#2 String": "t", "Quality": "1"},
    "qnli": {"question": "q", "sentence": "s", "label": "entailment"},
    "mnli": {"premise": "p", "hypothesis": "h", "label": "neutral"},
    "sst2": {"sentence": "s", "label": "1"},
}


def failure(rows, **options):
    with pytest.raises(CalibrationError) as caught:
        normalise(rows, where="rows.jsonl", **options)
    return str(caught.value)


def test_detection_needs_every_column():
    assert detect_format([{"prompt": "p", "output": "o", "text": "t"}]) == "text"


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(FORMATS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_detection_ignores_other_columns(name):
    assert detect_format([{"id": 3, **EXAMPLES[name]}]) == name


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_turns(name):
    [conversation] = normalise([EXAMPLES[name]])
    assert conversation.messages == (SYSTEM, USER, ASSISTANT)
    assert conversation.plain == (
        Segment("### System:\ns\n\n", False),
        Segment("### User:\nq\n\n", False),
        Segment("### Assistant:\n", False),
        Segment("a", True),
    )


def test_alpaca_without_input():
    for row in ({"instruction": "q", "output": "a"}, EXAMPLES["alpaca"], {**EXAMPLES["alpaca"], "input": None}):
        [conversation] = normalise([row])
        assert conversation.messages == (USER, ASSISTANT)
        prompt, reply = conversation.plain
        assert prompt.text == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nq\n\n### Response:"
        )
        assert (prompt.learnt, reply) == (False, Segment("a", True))


def test_alpaca_with_input():
    [conversation] = normalise([{"instruction": "q {input}", "input": "c", "output": "a"}])
    assert conversation.messages[0]["content"] == "q {input}\n\nc"
    assert conversation.plain[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nq {input}\n\n### Input:\nc\n\n"
        "### Response:"
    )


def test_prompt_completion_is_kept_as_it_is():
    [conversation] = normalise([EXAMPLES["prompt-completion"]])
    assert conversation.messages == (USER, ASSISTANT)
    assert conversation.plain == (Segment("q", False), Segment("a", True))


def test_text_has_no_turns():
    [conversation] = normalise([EXAMPLES["text"]])
    assert conversation.is_text
    assert conversation.plain == (Segment("t", True),)


def test_unknown_columns_are_listed():
    text = failure([{"question": "q" * 500, "answer": "a"}])
    assert "columns question, answer" in text
    assert all(name in text for name in FORMATS)
    assert "rows.jsonl" in text
    assert "{'question': 'qqq" in text
    assert "q" * 250 not in text


def test_no_rows():
    assert "no rows" in failure([])


def test_unknown_format_names_the_nearest():
    assert "did you mean 'alpaca'" in failure([EXAMPLES["text"]], format="alpacca")


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("alpaca", {"instruction": "q"}, "no field 'output'"),
        ("alpaca", {"instruction": "q", "output": None}, "'output' is NoneType"),
        ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "'input' is int"),
        ("prompt-completion", {"prompt": "q", "completion": 1.5}, "'completion' is float"),
        ("text", {"text": None}, "'text' is NoneType"),
        ("messages", {"messages": None}, "not a list"),
        ("messages", {"messages": []}, "not a list"),
        ("messages", {"messages": ["hello"]}, "not a list"),
        ("messages", {"other": 1}, "not a list"),
        ("messages", {"messages": [{"role": "user"}]}, "no field 'content'"),
        ("messages", {"messages": [{"role": "human", "content": "q"}]}, "unknown 'role': human"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "'content' is NoneType"),
        ("sharegpt", {"conversations": [{"from": "bard", "value": "q"}]}, "unknown 'from': bard"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": 3}]}, "'value' is int"),
    ],
)
def test_bad_row_is_named(name, bad, reason):
    text = failure([EXAMPLES[name], EXAMPLES[name], bad])
    assert "rows.jsonl, row 3" in text
    assert reason in text
    assert f"fields {', '.join(bad)}" in text
    assert f"wanted: {', '.join(FORMATS[name][0])}" in text
