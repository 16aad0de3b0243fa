"""Perplexity against the textbook: a loop over windows in float64."""

import math
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from slimtune.errors import CalibrationError, RecipeError, ShapeError
from slimtune.evaluate import perplexity as module
from slimtune.evaluate.perplexity import perplexity

VOCABULARY, POSITIONS = 37, 16


def llama(scale: float = 1.0, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            attention_dropout=0.5,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.normal_().mul_(scale)
    return model


def text(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def textbook(model: LlamaForCausalLM, tokens: torch.Tensor, length: int) -> tuple[float, int]:
    """Mean loss and predicted tokens: one window at a time, one token at a time."""
    model = model.double().eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens), length):
        window = tokens[start : start + length]
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        for position in range(len(window) - 1):
            total -= torch.log_softmax(logits[position], -1)[window[position + 1]].item()
            count += 1
    return total / count, count


@pytest.mark.parametrize(("n", "windows"), [(32, 4), (35, 5), (33, 4), (34, 5), (5, 1), (2, 1)])
def test_equals_the_textbook_with_and_without_a_shorter_last_window(n: int, windows: int) -> None:
    model, tokens = llama(), text(n)
    result = perplexity(model.double(), tokens, length=8)
    loss, count = textbook(model, tokens, 8)
    assert result.loss == pytest.approx(loss, rel=1e-6)  # cross entropy itself is float32
    assert result.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert (result.tokens, result.windows, result.length) == (count, windows, 8)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7])
def test_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, tokens = llama().double(), text(61)
    one, many = perplexity(model, tokens, length=8), perplexity(model, tokens, length=8, batch_size=batch_size)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert (many.tokens, many.windows) == (one.tokens, one.windows) == (53, 8)


def test_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = llama(), text(50)
    whole = perplexity(model, tokens, length=10, batch_size=2)
    monkeypatch.setattr(module, "CHUNK", 3)
    assert perplexity(model, tokens, length=10, batch_size=2) == whole


def test_windows_do_not_see_each_other() -> None:
    model, first, second = llama().double(), text(8, seed=2), text(8, seed=3)
    apart = [perplexity(model, part, length=8).loss for part in (first, second)]
    assert perplexity(model, torch.cat([first, second]), length=8).loss == pytest.approx(sum(apart) / 2, rel=1e-6)


def test_each_module_stays_in_its_mode_and_no_gradient_is_kept() -> None:
    model = llama().train()
    model.lm_head.eval()
    before = {name: part.training for name, part in model.named_modules()}
    first = perplexity(model, text(24), length=8)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert perplexity(model, text(24), length=8) == first, "dropout was on"
    assert all(weight.grad is None for weight in model.parameters())


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(llama(), text(35), length=8, batch_size=3, progress=lambda done, windows: seen.append((done, windows)))
    assert seen == [(3, 5), (4, 5), (5, 5)]


def test_a_huge_perplexity_is_a_finite_number() -> None:
    result = perplexity(llama(scale=1e5), text(16), length=8)
    assert result.value == sys.float_info.max
    assert 710 < result.loss < math.inf


def test_a_broken_model_names_the_window() -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = math.nan
    tokens = torch.ones(40, dtype=torch.long)
    tokens[25] = 5
    with pytest.raises(CalibrationError, match="window 3 of the text"):
        perplexity(model, tokens, length=8, batch_size=2)


def test_refuses_what_cannot_be_measured() -> None:
    model = llama()
    assert perplexity(model, text(40), length=POSITIONS).windows == 3, "every position can be used"
    for length in (1, 0, POSITIONS + 1):
        with pytest.raises(RecipeError, match=f"got: +{length}"):
            perplexity(model, text(40), length=length)
    with pytest.raises(RecipeError, match="batch"):
        perplexity(model, text(40), length=8, batch_size=0)
    with pytest.raises(CalibrationError, match="1 tokens"):
        perplexity(model, text(1), length=8)
    with pytest.raises(CalibrationError, match=f"got: +{VOCABULARY}"):
        perplexity(model, torch.tensor([1, VOCABULARY]), length=8)
    with pytest.raises(CalibrationError, match=r"got: +-1"):
        perplexity(model, torch.tensor([1, -1]), length=8)
    with pytest.raises(ShapeError, match="one sequence"):
        perplexity(model, text(40)[None], length=8)


def test_refuses_an_encoder_decoder() -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(RecipeError, match="T5ForConditionalGeneration"):
        perplexity(T5ForConditionalGeneration(config), text(16), length=8)
