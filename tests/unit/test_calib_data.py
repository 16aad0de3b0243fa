"""Calibration windows are stretches of the joined documents, without overlap, and the same for the same seed."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimtune.calib.data import calibration_tokens, text_tokens
from slimtune.errors import CalibrationError

BEGIN, END = 1000, 1001


def numbers_tokenizer(begins=False, template=None):
    """Every number below 1000 is a token, split at blanks; it adds <s> to a text if it `begins`."""
    backend = Tokenizer(
        models.WordLevel({**{str(i): i for i in range(1000)}, "<s>": BEGIN, "</s>": END, "?": 1002}, "?")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template, model_max_length=8
    )


def count_to(n):
    return " ".join(map(str, range(n)))


@pytest.mark.parametrize("tokens", [40, 41, 47, 500])
def test_windows_are_consecutive_and_do_not_overlap(tokens):
    windows = calibration_tokens(count_to(tokens), numbers_tokenizer(), samples=8, length=5)
    assert windows.shape == (8, 5)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(5))
    assert bool((windows[1:, 0] - windows[:-1, 0] >= 5).all())
    assert windows.max() < tokens


def test_every_placement_is_as_likely():
    """Two windows of two tokens in five tokens: three placements."""
    tokenizer = numbers_tokenizer()
    drawn = [calibration_tokens(count_to(5), tokenizer, 2, 2, seed)[:, 0].tolist() for seed in range(600)]
    counts = [drawn.count(starts) for starts in ([0, 2], [0, 3], [1, 3])]
    assert sum(counts) == 600
    assert min(counts) > 150


def test_seed_decides_and_nothing_else():
    tokenizer = numbers_tokenizer()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (calibration_tokens(count_to(900), tokenizer, 4, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_short_data_gives_what_there_is():
    assert calibration_tokens(count_to(23), numbers_tokenizer(), samples=8, length=5).shape == (4, 5)


def test_too_short_for_one():
    with pytest.raises(CalibrationError, match=r"c4\.jsonl[\s\S]*3 tokens[\s\S]*at least 5"):
        calibration_tokens(count_to(3), numbers_tokenizer(), length=5, where="c4.jsonl")


def test_documents_are_joined_with_the_tokenizers_special_tokens():
    rows = [{"text": "1 2"}, {"text": "3"}]
    for begins, wanted in ((False, [1, 2, 3]), (True, [BEGIN, 1, 2, BEGIN, 3])):
        tokenizer = numbers_tokenizer(begins)
        windows = calibration_tokens(rows, tokenizer, samples=1, length=len(wanted))
        assert windows.tolist() == [wanted]


def test_plain_replies_are_closed():
    rows = [{"prompt": "1 2 ", "completion": "3"}] * 2
    windows = calibration_tokens(rows, numbers_tokenizer(), samples=1, length=8)
    assert windows.tolist() == [[1, 2, 3, END] * 2]


def test_conversations_go_through_the_template_alone():
    tokenizer = numbers_tokenizer(begins=True, template="{% for m in messages %} {{ m.content }} <s>{% endfor %}")
    windows = calibration_tokens([{"prompt": "1 2", "completion": "3"}] * 2, tokenizer, samples=1, length=10)
    assert windows.tolist() == [[1, 2, BEGIN, 3, BEGIN] * 2]


def test_template_that_refuses_a_row_names_it():
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    rows = [{"messages": [{"role": role, "content": "1"}]} for role in ("user", "system")]
    with pytest.raises(CalibrationError, match=r"a\.jsonl, row 2[\s\S]*no system"):
        calibration_tokens(rows, numbers_tokenizer(template=refuse), length=2, where="a.jsonl")


def test_text_tokens_of_a_long_text_are_bare_and_silent(caplog):
    logger = logging.getLogger("transformers")  # it does not hand its records on to the root
    logger.addHandler(caplog.handler)
    tokens = text_tokens(count_to(50), numbers_tokenizer(begins=True))
    logger.removeHandler(caplog.handler)
    assert torch.equal(tokens, torch.arange(50))
    assert tokens.dtype == torch.int64
    assert caplog.text == ""
