"""Speed: what is fed to the model, and what is counted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from slimtune.errors import RecipeError
from slimtune.evaluate import speed as module
from slimtune.evaluate.speed import speed

VOCABULARY, POSITIONS = 37, 24


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
        )
    )


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    )


def calls(model: PreTrainedModel) -> list[dict[str, Any]]:
    """A list that every later call of the model adds its keywords to."""
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def test_a_run_is_one_prefill_and_one_token_a_step() -> None:
    model = llama()
    seen = calls(model)
    result = speed(model, prompt_tokens=9, new_tokens=4, repeats=2)
    widths = [call["input_ids"].shape[1] for call in seen]
    assert widths == [9, 1, 1, 1, 1] * 3, "a warm-up and two repeats"
    assert (result.prompt_tokens, result.new_tokens) == (9, 4)
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0


def test_the_steps_are_greedy_generation() -> None:
    model = llama().eval()
    seen = calls(model)
    speed(model, prompt_tokens=9, new_tokens=6, repeats=1)
    prompt, steps = seen[0]["input_ids"], [call["input_ids"].item() for call in seen[1:7]]
    for _ in range(6):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
    assert steps == prompt[0, 9:].tolist()


def test_the_prompt_is_the_same_in_every_call_and_uses_no_global_randomness() -> None:
    model = llama()
    seen = calls(model)
    state = torch.get_rng_state()
    for _ in range(2):
        speed(model, prompt_tokens=9, new_tokens=1, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen[0]["input_ids"], seen[-2]["input_ids"])


def test_an_encoder_decoder_reads_the_prompt_once() -> None:
    model = t5()
    encoded = calls(model.encoder)
    seen = calls(model)
    result = speed(model, prompt_tokens=9, new_tokens=4, repeats=1)
    assert [call["input_ids"].shape[1] for call in encoded] == [9, 9], "a warm-up and one repeat"
    assert [call["decoder_input_ids"].shape[1] for call in seen] == [1] * 10
    assert result.decode_tokens_per_second > 0


def test_rates_are_tokens_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Start, middle, end of the warm-up and of three repeats: prefills of 2, 5 and 3 s, decodes of 8, 1 and 4 s.
    clock = iter([0, 90, 99, 100, 102, 110, 200, 205, 206, 300, 303, 307])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    result = speed(llama(), prompt_tokens=12, new_tokens=8, repeats=3)
    assert (result.prefill_tokens_per_second, result.decode_tokens_per_second) == (4.0, 2.0)


def test_the_model_is_run_for_inference_and_put_back() -> None:
    model = llama().train()
    seen: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    speed(model, prompt_tokens=4, new_tokens=1, repeats=1)
    assert set(seen) == {(False, False)}
    assert all(part.training for part in model.modules())


def test_refuses_counts_and_lengths_that_cannot_be_timed() -> None:
    model = llama()
    for name in ("prompt_tokens", "new_tokens", "repeats"):
        with pytest.raises(RecipeError, match=name):
            speed(model, **{"prompt_tokens": 4, "new_tokens": 4, "repeats": 1, name: 0})
    with pytest.raises(RecipeError, match=f"at most {POSITIONS}"):
        speed(model, prompt_tokens=POSITIONS, new_tokens=1)
