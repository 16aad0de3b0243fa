"""ROUGE of greedy replies: batches write what single prompts do, and scores are those of the words themselves."""

from __future__ import annotations

import pytest
import torch
from tests.pico import pico_model, pico_tokenizer

import slimtune
from slimtune.calib.formats import normalise
from slimtune.errors import CalibrationError, RecipeError
from slimtune.evaluate.rouge import replies, rouge
from slimtune.quant.linear import QuantLinear

pytest.importorskip("rouge_score")
PROMPTS = ["one", "two words here", "and a much longer prompt than the others"]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_batch_writes_what_a_loop_over_single_prompts_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico_model(family), pico_tokenizer()
    with torch.no_grad():  # or any prompt is answered alike
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight.normal_(generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(tokenizer, "batch_decode", lambda rows, **_: [str(row.tolist()) for row in rows])
    found = replies(model, tokenizer, PROMPTS, 5)
    assert len(set(found)) > 1
    for prompt, reply in zip(PROMPTS, found, strict=True):
        ids, new = tokenizer(prompt, add_special_tokens=False)["input_ids"], []
        for _ in range(5):
            if family == "t5":
                started = [model.config.decoder_start_token_id, *new]
                inputs = {"input_ids": [[*ids, tokenizer.eos_token_id]], "decoder_input_ids": [started]}
            else:
                inputs = {"input_ids": [ids + new]}
            with torch.no_grad():
                logits = model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
        started = [model.config.decoder_start_token_id] if family == "t5" else []
        assert reply.startswith(str(started + new)[:-1])  # after an end there are fillers
    assert not model.training


def test_packed_layers_are_prepared_while_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = slimtune.quantize(pico_model("llama"), "rtn", bits=4, group_size=8)
    layers, real, prepared = [m for m in model.modules() if isinstance(m, QuantLinear)], model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **rest: (prepared.extend(layer.small for layer in layers), real(**rest))[1]
    )
    replies(model, pico_tokenizer(), PROMPTS, 2)
    assert len(prepared) == len(layers) and None not in prepared
    assert all(layer.small is None for layer in layers)


def test_scores_are_those_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    written = iter([["the cats sat"], ["a dog"]])
    monkeypatch.setattr("slimtune.evaluate.rouge.replies", lambda *_: next(written))
    rows = normalise([{"prompt": "p", "completion": "the cat sat down"}, {"prompt": "q", "completion": "nothing like"}])
    found = rouge(pico_model("llama"), pico_tokenizer(), rows, batch_size=1)
    one, two = 2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4), 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)  # cats is cat
    assert found == pytest.approx({"rouge1": one / 2, "rouge2": two / 2, "rougeL": one / 2})


def test_what_cannot_be_compared_is_refused() -> None:
    model, tokenizer = pico_model("llama"), pico_tokenizer()
    with pytest.raises(CalibrationError, match="no row"):
        rouge(model, tokenizer, [])
    with pytest.raises(CalibrationError, match="no prompt"):
        rouge(model, tokenizer, normalise([{"text": "running"}]))
    with pytest.raises(RecipeError, match="positions"):
        rouge(model, tokenizer, normalise([{"prompt": "p", "completion": "c"}]), max_new_tokens=10**6)
