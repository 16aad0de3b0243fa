"""Biases that make up for what pruning takes away, where a stock configuration has a place for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import bind
from slimtune.errors import RecipeError
from slimtune.prune.biases import give_biases_
from slimtune.prune.groups import axes
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.plan import plan
from slimtune.recipe.schema import recipe_from

WINDOWS = torch.randint(6, 262, (6, 24), generator=torch.Generator().manual_seed(1))
PRUNE: dict[str, Any] = {"ratio": 0.3, "importance": "flap", "multiple_of": 2, "calibration": WINDOWS}


def read_by(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """The input and the output of a linear on the calibration tokens, `[tokens, features]`."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    handle.remove()
    return tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in seen[0])  # type: ignore[return-value]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("family", "targets", "reader", "ratio"),
    [
        ("llama", ("kv", "ffn"), "model.layers.0.self_attn.o_proj", 0.4),
        ("llama", ("ffn",), "model.layers.0.mlp.down_proj", 0.3),
        ("qwen3", ("kv",), "model.layers.0.self_attn.o_proj", 0.17),
        ("gemma2", ("heads",), "model.layers.0.self_attn.o_proj", 0.11),
        ("opt", ("ffn",), "model.decoder.layers.0.fc2", 0.3),
    ],
)
def test_the_mean_of_what_goes_stays(
    family: str, targets: tuple[str, ...], reader: str, ratio: float, refit: bool, tmp_path: Path
) -> None:
    model = pico_model(family, dtype=torch.float64)
    weight = model.get_submodule(reader).weight.detach().clone()
    facts: list[dict[str, Any]] = []
    size = sum(p.numel() for p in model.parameters())
    read, wrote = read_by(model, reader)
    options = {**PRUNE, "ratio": ratio, "targets": targets, "refit": refit}
    slimtune.prune(model, **options, bias=True, facts=facts.append)
    assert facts[0]["parameters_before"] == size and facts[0]["lost"]
    kept = facts[0]["kept"][reader]
    linear = model.get_submodule(reader)
    width = weight.shape[1] // (len(weight[0]) // (linear.in_features // len(kept)))
    columns = [u * width + i for u in kept for i in range(width)]
    assert torch.equal(linear.weight, weight[:, columns]) != refit
    # Nothing before the first reader has changed: the mean of its output is what it was.
    mean = read[:, columns].mean(0) @ linear.weight.T + linear.bias
    torch.testing.assert_close(mean, wrote.mean(0), rtol=1e-5, atol=1e-6)
    assert float(linear.bias.detach().abs().max()) > 0
    assert all(parameter.requires_grad for parameter in model.parameters())  # as they would be when read back
    bind(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs))
    assert f"{reader}.bias" in dict(again.named_parameters())


def test_a_bias_lets_a_fit_lose_less() -> None:
    lost = {}
    for bias in (False, True):
        facts: list[dict[str, Any]] = []
        slimtune.prune(pico_model(), **PRUNE, targets=("ffn",), bias=bias, refit=True, facts=facts.append)
        lost[bias] = facts[0]["lost"][0]["share"]
    assert lost[True] != lost[False]


@pytest.mark.parametrize(("family", "targets"), [("mistral", ("ffn",)), ("qwen2", ("kv",)), ("gemma2", ("kv", "ffn"))])
def test_no_place_is_an_error_and_changes_nothing(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model = pico_model(family)
    before, config = logits(model, pico_inputs(model)), model.config.to_dict()
    with pytest.raises(RecipeError, match="no place for a bias"):
        slimtune.prune(model, **PRUNE, targets=targets, bias=True)
    assert torch.equal(logits(model, pico_inputs(model)), before) and model.config.to_dict() == config
    folder = save_pico(tmp_path / "pico", family)
    text = tmp_path / "text.txt"
    text.write_text("a text to calibrate on " * 50)
    step = {"prune": {"ratio": 0.3, "targets": list(targets), "bias": True, "multiple_of": 2}}
    data = {"calibration": {"path": str(text), "samples": 2, "length": 16}}
    with pytest.raises(RecipeError, match="no place for a bias") as caught:
        plan(recipe_from({"model": str(folder), "data": data, "steps": [step]}))
    assert "steps[0].prune" in str(caught.value)


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2"])
def test_a_key_that_means_nothing_to_the_model_is_no_place(family: str) -> None:
    model = pico_model(family)
    model.config.attention_bias = False
    with pytest.raises(RecipeError, match="no place for a bias"):
        slimtune.prune(model, **{**PRUNE, "ratio": 0.1}, targets=("kv",), bias=True)
    assert model.config.attention_bias is False and bind(model)


def test_the_plan_counts_them(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico", "llama")
    text = tmp_path / "text.txt"
    text.write_text("a text to calibrate on " * 50)
    data = {"calibration": {"path": str(text), "samples": 2, "length": 16}}
    step = {"prune": {"ratio": 0.3, "bias": True, "multiple_of": 2}}
    assert plan(recipe_from({"model": str(folder), "data": data, "steps": [step]})).steps


def test_packed_layers_are_given_none() -> None:
    model = pico_model()
    quantize_(model, bind(model), all_linear(Rtn(bits=8, group_size=8)))
    with pytest.raises(RecipeError, match="packed weights cannot be fitted"):
        slimtune.prune(model, **PRUNE, targets=("ffn",), bias=True)
    modelmap = bind(model)
    with pytest.raises(RecipeError, match="only a plain linear"):
        give_biases_(model, modelmap, axes(modelmap, ("ffn",)))
    assert model.config.mlp_bias is False


@pytest.mark.parametrize(
    ("options", "message"),
    [({"schedule": "cubic"}, "at once"), ({"targets": ("layers",), "importance": "influence"}, "sub-layer")],
)
def test_biases_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        slimtune.prune(pico_model(), **{**PRUNE, **options}, bias=True, tokenizer=pico_tokenizer())
