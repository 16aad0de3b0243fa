"""Keys and values in few bits: what attention reads, prefilling and decoding, kept in folders, undone by merging."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimtune
from pico import PICO, logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.errors import FormatError, RecipeError, SlimtuneError
from slimtune.evaluate.generate import stream
from slimtune.evaluate.inference import cache_of
from slimtune.evaluate.packed_cache import PackedLayer, packed_cache
from slimtune.export import Source, export
from slimtune.export.native import write_model
from slimtune.hub import cache_bits, round_cache_
from slimtune.linalg.packing import row_bytes
from slimtune.quant.activation import Activations
from slimtune.recipe.plan import plan
from slimtune.recipe.schema import recipe_from

RTN: dict[str, Any] = {"method": "rtn", "bits": 8, "group_size": 8}


@pytest.mark.parametrize("family", list(PICO))
def test_every_family_rounds_and_is_restored(family: str) -> None:
    model = pico_model(family)
    inputs = pico_inputs(model)
    exact = logits(model, inputs)
    off = {}
    for bits in (8, 4, 2):
        round_cache_(model, bits)
        assert cache_bits(model) == bits
        off[bits] = float((logits(model, inputs) - exact).abs().mean())
    assert 0 < off[8] < off[4] < off[2]
    round_cache_(model, 16)
    assert cache_bits(model) == 16 and torch.equal(logits(model, inputs), exact)


def test_each_head_of_a_token_has_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model()
    seen: list[torch.Tensor] = []
    real = Activations.__call__
    monkeypatch.setattr(Activations, "__call__", lambda self, x: (seen.append(x), real(self, x))[1])
    round_cache_(model, 4)
    logits(model, pico_inputs(model, batch=2, length=9))
    assert [tuple(x.shape) for x in seen] == [(2, 2, 9, 12)] * 4  # keys and values of two layers


def test_decoding_reads_what_prefill_read() -> None:
    model = pico_model()
    round_cache_(model, 4)
    tokens = pico_inputs(model, batch=1)["input_ids"]
    whole = logits(model, {"input_ids": tokens})
    with torch.no_grad():
        cache = cache_of(model(input_ids=tokens[:, :-1], use_cache=True))
        last = model(input_ids=tokens[:, -1:], **cache, use_cache=True).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1])


@pytest.mark.parametrize("family", list(PICO))
def test_turned_queries_and_keys_have_the_same_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped keys, q/k norms, partial rotary embeddings, position biases, windows: all act before or after."""
    model = pico_model(family, dtype=torch.float64, **({"partial_rotary_factor": 0.5} if family == "phi3" else {}))
    inputs = pico_inputs(model)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Activations, "__call__", lambda self, x: (seen.append(x), x)[1])
    round_cache_(model, 4)
    exact = logits(model, inputs)
    model.config.slimtune_rotation = {"online": ["r3"]}
    round_cache_(model, 4)
    assert cache_bits(model) == 4
    torch.testing.assert_close(logits(model, inputs), exact, rtol=1e-11, atol=1e-11)
    (plain_key, value), (turned_key, same_value) = seen[:2], seen[len(seen) // 2 :][:2]
    assert torch.equal(value, same_value) and not torch.allclose(plain_key, turned_key)
    torch.testing.assert_close(plain_key.norm(dim=-1), turned_key.norm(dim=-1))


def test_keys_with_an_outlier_lose_less_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    off: dict[tuple[str, ...], list[float]] = {}
    real = Activations.__call__
    for online in ((), ("r3",)):
        model = pico_model(attention_bias=True, head_dim=64)
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.k_proj.weight.data *= 0.2  # type: ignore[union-attr]
            layer.self_attn.k_proj.bias.data[31::64] += 20.0  # type: ignore[union-attr]
        inputs = pico_inputs(model)
        exact = logits(model, inputs)
        slimtune.rotate(model, online=online)
        torch.testing.assert_close(logits(model, inputs), exact, rtol=1e-4, atol=1e-4)  # nothing is rounded yet
        found = off[online] = []
        monkeypatch.setattr(
            Activations, "__call__", lambda a, x, f=found: (f.append(float((real(a, x) - x).norm())), real(a, x))[1]
        )
        round_cache_(model, 4)
        logits(model, inputs)
    for plain, turned in zip(off[()][::2], off[("r3",)][::2], strict=True):  # keys; the others are values
        assert turned < 0.6 * plain


@pytest.mark.parametrize("order", ["rotated", "read"])
def test_a_turned_cache_is_kept_in_its_folder(order: str, tmp_path: Path) -> None:
    model = slimtune.rotate(pico_model("qwen3"), online=("r3", "heads"))
    if order == "read":
        write_model(model, pico_tokenizer(), tmp_path / "dense")  # type: ignore[arg-type]
        model, _ = slimtune.load(str(tmp_path / "dense"))
    slimtune.quantize(model, **RTN, kv_cache={"bits": 3})
    write_model(model, pico_tokenizer(), tmp_path)  # type: ignore[arg-type]
    inputs = pico_inputs(model)  # type: ignore[arg-type]
    back, _ = slimtune.load(str(tmp_path))
    assert torch.equal(logits(back, inputs), logits(model, inputs))  # type: ignore[arg-type]
    assert back.config._attn_implementation.startswith("slimtune_cache_3_turned:")


def test_turned_keys_alone_stop_no_export(tmp_path: Path) -> None:
    model = slimtune.rotate(pico_model(), online=("r3",))
    export(Source(model, pico_tokenizer(), "pico"), "safetensors", tmp_path / "out")
    folder = save_pico(tmp_path / "pico")
    steps = [{"rotate": {"online": ["r3"]}}, {"export": {"format": "safetensors"}}]
    plan(recipe_from({"model": str(folder), "steps": steps}))
    with pytest.raises(RecipeError, match="runs the online transform r4:"):
        plan(recipe_from({"model": str(folder), "steps": [{"rotate": {"online": ["r3", "r4"]}}, steps[1]]}))


def test_a_folder_keeps_it_and_merging_undoes_it(tmp_path: Path) -> None:
    model = slimtune.quantize(pico_model(), **RTN, kv_cache={"bits": 4})
    write_model(model, pico_tokenizer(), tmp_path)  # type: ignore[arg-type]
    wanted = logits(model, pico_inputs(model))  # type: ignore[arg-type]
    for read in (slimtune.load(str(tmp_path))[0], AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert cache_bits(read) == 4
        assert torch.equal(logits(read, pico_inputs(read)), wanted)
    assert cache_bits(slimtune.merge(slimtune.add_lora(model, r=2))) == 16


def test_a_folder_that_says_something_else_is_refused(tmp_path: Path) -> None:
    write_model(slimtune.quantize(pico_model(), **RTN, kv_cache={"bits": 4}), pico_tokenizer(), tmp_path)  # type: ignore[arg-type]
    path = tmp_path / "config.json"
    text = path.read_text()
    assert '"kv_cache"' in text
    for wrong in ('"bits": 4,\n      "more": 1', '"bits": 99'):
        path.write_text(text.replace('"kv_cache": {\n      "bits": 4', '"kv_cache": {\n      ' + wrong))
        with pytest.raises(SlimtuneError, match="unknown way"):
            slimtune.load(str(tmp_path))


@pytest.mark.parametrize("format", ["safetensors", "gptq", "compressed-tensors"])
def test_formats_that_cannot_say_so_are_refused(format: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico")
    steps = [{"quantize": {**RTN, "kv_cache": {"bits": 4}}}, {"export": {"format": format}}]
    with pytest.raises(RecipeError, match="cache is rounded"):
        plan(recipe_from({"model": str(folder), "steps": steps}))
    model, tokenizer = slimtune.load(str(folder))
    slimtune.quantize(model, **RTN, kv_cache={"bits": 4})
    with pytest.raises(FormatError, match="cache is rounded"):
        export(Source(model, tokenizer, "pico"), format, tmp_path / "out")


@pytest.mark.parametrize("facts", [{"bit": 4}, {"bits": 1}, {"bits": "few"}], ids=str)
def test_what_is_wrong_is_named(facts: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        slimtune.quantize(pico_model(), **RTN, kv_cache=facts)
    assert "kv_cache" in str(caught.value)


DECODERS = sorted(family for family in PICO if not family.startswith("t5"))


def replies(model: Any, tokens: torch.Tensor, cache: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of a prompt, then of two and of single tokens, read after it."""
    found = []
    with torch.no_grad():
        for some in tokens.split([tokens.shape[1] - 4, 2, 1, 1], 1):
            output = model(input_ids=some, **cache, use_cache=True)
            cache = cache_of(output)
            found.append(output.logits)
    return found


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_a_packed_cache_is_read_as_rounding_reads(family: str, bits: int, turned: bool) -> None:
    model = pico_model(family)
    if turned:
        model.config.slimtune_rotation = {"online": ["r3"]}
    round_cache_(model, bits)
    tokens = pico_inputs(model, batch=2, length=9)["input_ids"]
    cache = packed_cache(model)
    (layers,) = (each.layers for each in cache.values())
    for got, wanted in zip(replies(model, tokens, cache), replies(model, tokens, {}), strict=True):
        if family in ("mistral", "gemma2", "gemma3"):  # transformers drops what is behind a window
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, wanted)
    text = model.config.get_text_config()
    assert len(layers) == text.num_hidden_layers and {layer.get_seq_length() for layer in layers} == {9}
    width = layers[0].widths[0]
    assert layers[0].keys.dtype == torch.uint8 and layers[0].keys.shape[-1] == 5 + row_bytes(width, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_single_rows_and_what_is_no_number(bits: int) -> None:
    for x in (torch.randn(1, 1, 1, 12), torch.full((1, 1, 1, 12), torch.nan), torch.randn(2, 1, 3, 7)):
        layer = PackedLayer(bits, turned=False)
        keys, values = layer.update(x, -x)
        rounding = Activations(bits, sym=False)
        for got, wanted in ((keys, rounding(x)), (values, rounding(-x))):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_reply_is_written_from_a_packed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    inputs = {"input_ids": pico_inputs(model, batch=1)["input_ids"]}
    round_cache_(model, 4)
    packed: list[int] = []
    real = PackedLayer.update
    monkeypatch.setattr(PackedLayer, "update", lambda self, *a, **k: (packed.append(1), real(self, *a, **k))[1])
    with_it = list(stream(model, tokenizer, inputs, 6))
    assert len(packed) >= 2 * len(with_it) > 0
    monkeypatch.setattr("slimtune.evaluate.generate.packed_cache", lambda _: {})
    assert list(stream(model, tokenizer, inputs, 6)) == with_it


def test_transformers_generates_with_a_packed_cache() -> None:
    model = pico_model()
    inputs = {"input_ids": pico_inputs(model, batch=2)["input_ids"]}
    round_cache_(model, 4)
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        wanted = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, **packed_cache(model)), wanted)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_not_rounded_is_not_packed(family: str) -> None:
    model = pico_model(family)
    if family == "t5":
        round_cache_(model, 4)
    assert packed_cache(model) == {}


def test_merging_into_packed_weights_keeps_it() -> None:
    model = slimtune.add_lora(slimtune.quantize(pico_model(), **RTN, kv_cache={"bits": 4}), r=2)
    assert cache_bits(slimtune.merge(model, keep_bits=True)) == 4
