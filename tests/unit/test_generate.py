"""Generation: the tokens of transformers' own, one at a time, and how the next one is chosen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from pico import EOS, PAD, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.evaluate.generate import Pace, Sampling, choose, stream, write_reply
from slimtune.lora.attach import add_lora
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn

NEW = 12
FREE: dict[str, Any] = {"temperature": 3.0, "seed": 3}


class Numbers:
    """A tokenizer whose text is the tokens' numbers; token `half` is the first half of a character."""

    eos_token_id = EOS
    half = -1

    def decode(self, tokens: list[int]) -> str:
        text = "".join(f"{token}," for token in tokens)
        return text.removesuffix(f"{self.half},") + "\N{REPLACEMENT CHARACTER}" if tokens[-1] == self.half else text


def tokens_of(model: Any, inputs: dict[str, torch.Tensor], new: int = NEW, **fields: Any) -> list[int]:
    tokenizer: Any = Numbers()
    pieces = list(stream(model, tokenizer, inputs, new, Sampling(**fields)))
    return [int(number) for number in "".join(pieces).split(",") if number]


def quantized(family: str) -> Any:
    model = pico_model(family)
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=8)))
    return model


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "dense") for family in ("llama", "gemma2", "gemma3", "mistral", "opt", "t5", "llava")),
        *((family, kind) for family in ("llama", "t5") for kind in ("packed", "adapted")),
    ],
)
def test_tokens_are_those_that_the_whole_text_gives_without_a_cache(family: str, kind: str) -> None:
    model: Any = pico_model(family) if kind == "dense" else quantized(family)
    prompt = torch.randint(6, 262, (1, 9), generator=torch.Generator().manual_seed(5))
    if kind == "adapted":
        model = add_lora(model, r=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    reply = tokens_of(model, {"input_ids": prompt}, **FREE)
    assert len(set(reply)) > 3
    ids, start, encoder = torch.tensor([reply]), prompt, {}
    if model.config.is_encoder_decoder:
        start, encoder = torch.tensor([[PAD]]), {"input_ids": prompt}
    name = "decoder_input_ids" if encoder else "input_ids"
    with torch.no_grad():
        scores = model(**encoder, **{name: torch.cat([start, ids], 1)}).logits[0, start.shape[1] - 1 : -1]
    generator = torch.Generator().manual_seed(FREE["seed"])
    assert [choose(row, Sampling(**FREE), generator) for row in scores] == reply


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model = quantized(family)
    prompt = torch.randint(6, 262, (1, 9), generator=torch.Generator().manual_seed(5))
    wanted = model.generate(input_ids=prompt, max_new_tokens=NEW, do_sample=False)[0]
    assert tokens_of(model, {"input_ids": prompt}) == wanted[1 if family == "t5" else 9 :].tolist()


def test_reply_ends_at_the_end_of_sequence_and_at_a_models_own_ends() -> None:
    model = pico_model("llama")
    inputs = {"input_ids": torch.arange(6, 15)[None]}
    whole = tokens_of(model, inputs, **FREE)
    later = next(token for token in whole[1:] if token != whole[0])
    model.generation_config.eos_token_id = [EOS, later]
    assert tokens_of(model, inputs, **FREE) == whole[: whole.index(later)]


def test_reply_ends_at_the_last_position_and_a_longer_prompt_is_refused() -> None:
    model = pico_model("llama", max_position_embeddings=12)
    assert len(tokens_of(model, {"input_ids": torch.arange(6, 15)[None]})) == 3
    with pytest.raises(RecipeError, match="positions"):
        tokens_of(model, {"input_ids": torch.arange(6, 18)[None]})


def test_half_a_character_is_held_back() -> None:
    model = pico_model("llama")
    inputs = {"input_ids": torch.arange(6, 15)[None]}
    second, third = tokens_of(model, inputs, **FREE)[1:3]
    tokenizer: Any = Numbers()
    tokenizer.half = second
    pieces = list(stream(model, tokenizer, inputs, 3, Sampling(**FREE)))
    assert pieces[1] == "" and pieces[2] == f"{second},{third},"


def test_model_is_left_in_its_mode_and_no_gradient_is_kept() -> None:
    model = pico_model("llama").train()
    pieces = stream(model, pico_tokenizer(), pico_inputs(model, batch=1), 3)
    next(pieces)
    assert model.training and torch.is_grad_enabled()


# --- chance ---

LOGITS = torch.tensor([1.0, 4.0, 2.0, 3.0])


def drawn(sampling: Sampling, count: int = 2000) -> Counter[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return Counter(choose(LOGITS, sampling, generator) for _ in range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(-1)
    found = drawn(Sampling(temperature=temperature))
    for token, share in enumerate(wanted.tolist()):
        assert abs(found[token] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5 + 1e-9


def test_nucleus_is_the_fewest_tokens_that_reach_the_probability() -> None:
    # 0.644, 0.237, 0.087, 0.032
    assert set(drawn(Sampling(temperature=1, top_p=0.6))) == {1}
    assert set(drawn(Sampling(temperature=1, top_p=0.7))) == {1, 3}
    assert set(drawn(Sampling(temperature=1, top_p=0.9))) == {1, 2, 3}
    found = drawn(Sampling(temperature=1, top_p=0.7))
    assert abs(found[1] / 2000 - 0.644 / 0.881) < 0.03


def test_no_temperature_is_greedy_and_a_seed_says_the_same_twice() -> None:
    model = pico_model("llama")
    inputs = {"input_ids": torch.arange(6, 15)[None]}
    assert tokens_of(model, inputs, temperature=0, seed=7) == tokens_of(model, inputs, temperature=1, top_p=1e-9)
    first, again, other = (tokens_of(model, inputs, temperature=2, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "fields", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_sampling_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        Sampling(**fields)


# --- pace ---


def test_pace_counts_what_was_read_and_written() -> None:
    model = pico_model("llama")
    written: list[str] = []
    inputs = {"input_ids": torch.arange(6, 15)[None]}
    pace = write_reply(model, pico_tokenizer(), inputs, 5, Sampling(), written.append)
    assert (pace.prompt_tokens, pace.new_tokens) == (9, len(written)) == (9, 5)
    assert pace.first > 0 and pace.rest > 0
    assert Pace(10, 5, 2.0, 2.0).prefill_tokens_per_second == 5
    assert Pace(10, 5, 2.0, 2.0).decode_tokens_per_second == 2
    assert Pace(10, 1, 2.0, 0.0).decode_tokens_per_second == 0
    with pytest.raises(RecipeError, match="nothing to write"):
        write_reply(model, pico_tokenizer(), inputs, 0, Sampling(), written.append)


def test_reply_that_ends_at_once_has_a_pace() -> None:
    model = pico_model("llama")
    inputs = {"input_ids": torch.arange(6, 15)[None]}
    model.generation_config.eos_token_id = [tokens_of(model, inputs)[0]]
    pace = write_reply(model, pico_tokenizer(), inputs, 5, Sampling(), print)
    assert pace.new_tokens == 0 and pace.first > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_that_computes_no_numbers_does_not_write(bad: float) -> None:
    model = pico_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = bad
    with pytest.raises(FormatError, match="a weight is not finite") as caught:
        tokens_of(model, {"input_ids": pico_inputs(model)["input_ids"][:1]})
    assert caught.value.facts["where"] == "model.norm.weight"
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = 1.0
        model.get_parameter("lm_head.weight").fill_(3e38)  # each is finite, and their sums are not
    with pytest.raises(FormatError, match="logits are not finite"):
        tokens_of(model, {"input_ids": pico_inputs(model)["input_ids"][:1]})
