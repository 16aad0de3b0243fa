"""Models that round their inputs as compressed-tensors folders: transformers computes the same, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico, two_steps
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export
from slimtune.kernels.dispatch import reference
from slimtune.lora.attach import add_lora, plain
from slimtune.quant.linear import QuantLinear
from slimtune.recipe.plan import plan
from slimtune.recipe.schema import recipe_from

pytest.importorskip("compressed_tensors")
CHANNEL: dict[str, Any] = {"group_size": -1, "sym": True}
EIGHT: dict[str, Any] = {"bits": 8, "activations": {"bits": 8}, **CHANNEL}
FOUR: dict[str, Any] = {"bits": 4, "activations": {"bits": 4}, **CHANNEL}
RANGE: dict[str, Any] = {"static": True, "low": -2.3, "high": 3.1}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "W8A8": (EIGHT, "int-quantized"),
    "W8A8 in groups": ({**EIGHT, "group_size": 8}, "pack-quantized"),
    "W4A4": (FOUR, "pack-quantized"),
    "W4A8 in groups": ({**FOUR, "group_size": 8, "activations": {"bits": 8}}, "pack-quantized"),
    "W6A6": ({**FOUR, "bits": 6, "activations": {"bits": 6}}, "pack-quantized"),
    "W8A8 below W4A4": (
        {**FOUR, "layers": {"down_proj": {"bits": 8, "activations": {"bits": 8}}}},
        "mixed-precision",
    ),
    "W8A16 below W4A4": (
        {**FOUR, "layers": {"down_proj": {"bits": 8, "activations": {"bits": 16}}}},
        "pack-quantized",
    ),
    "W8A8 with zero points": ({**EIGHT, "activations": {"bits": 8, "sym": False}}, "int-quantized"),
    "W8A8, static": ({**EIGHT, "activations": {"bits": 8, **RANGE}}, "int-quantized"),
    "W4A8, static with zero points": ({**FOUR, "activations": {"bits": 8, "sym": False, **RANGE}}, "pack-quantized"),
    "W4A4, static and clipped": ({**FOUR, "activations": {"bits": 4, "clip_ratio": 0.8, **RANGE}}, "pack-quantized"),
    "some left alone": ({**FOUR, "ignore": ["down_proj", "o_proj"]}, "pack-quantized"),
}


def written(folder: Path, family: str = "llama", **options: Any) -> Any:
    model = slimtune.quantize(pico_model(family), "rtn", **options)
    export(Source(model, pico_tokenizer(), "pico"), "compressed-tensors", folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(case: str, tmp_path: Path) -> None:
    options, format = CASES[case]
    model = written(tmp_path / "out", **options)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = pico_inputs(model)
    with reference():
        wanted = logits(model, inputs)
    torch.testing.assert_close(logits(read, inputs), wanted, rtol=1e-5, atol=1e-5)
    for module in model.modules():  # the comparison notices whether inputs are rounded
        if type(module).__name__ == "QuantLinear":
            module.activations = None
    assert not torch.allclose(logits(model, inputs), wanted, rtol=1e-5, atol=1e-4)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert facts["format"] == format
    assert {group["format"] for group in facts["config_groups"].values()} <= {"int-quantized", "pack-quantized"}
    for group in facts["config_groups"].values():
        inputs_of = group["input_activations"]
        static = "static" in case
        wanted_of = ("tensor", False) if static else ("token", True)
        assert inputs_of is None or (inputs_of["strategy"], inputs_of["dynamic"]) == wanted_of
        assert inputs_of is None or inputs_of["symmetric"] is ("zero points" not in case)


@pytest.mark.parametrize("family", ["llama-biased", "gemma2", "phi3", "qwen3"])
@pytest.mark.parametrize("options", [EIGHT, FOUR], ids=["W8A8", "W4A4"])
def test_other_families_are_read_back(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "out", family, **options)  # which compares


@pytest.mark.parametrize(
    "activations",
    [{"clip_ratio": 0.9}, {"group_size": 8}],
    ids=str,
)
def test_what_the_format_cannot_say_is_refused(activations: dict[str, Any], tmp_path: Path) -> None:
    options = {**FOUR, "activations": {"bits": 4, **activations}}
    with pytest.raises(FormatError, match="cannot hold") as caught:
        written(tmp_path / "out", **options)
    assert next(iter(activations)) in str(caught.value)
    later = [{"quantize": {"method": "rtn", **options}}, {"export": {"format": "compressed-tensors"}}]
    with pytest.raises(RecipeError, match="how inputs are rounded"):
        plan(recipe_from({"model": str(save_pico(tmp_path / "pico")), "steps": later}))
    assert not (tmp_path / "out").exists()


def test_zero_points_of_weights_below_rounded_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="none rounds its input"):
        written(tmp_path / "out", **{**FOUR, "sym": False})


def packed(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in plain(model).items() if isinstance(module, QuantLinear)}


def rounding(layer: QuantLinear) -> Any:
    """How a layer rounds, whatever the range that its grid is made of."""
    found = layer.activations
    if found is None or not found.static:
        return found
    return found.bits, found.sym, *map(float, found.grid(torch.zeros(1), torch.zeros(1)))


def same(got: Any, wanted: Any) -> bool:
    """Whether both have the same packed layers: codes, scales, layouts and how inputs are rounded."""
    mine, yours = packed(got), packed(wanted)
    assert mine.keys() == yours.keys() and yours
    for name, layer in mine.items():
        assert (layer.layout, rounding(layer)) == (yours[name].layout, rounding(yours[name])), name
        assert all(torch.equal(t, yours[name].qtensor.tensors[leaf]) for leaf, t in layer.qtensor.tensors.items()), name
    return torch.equal(logits(got, pico_inputs(got)), logits(wanted, pico_inputs(wanted)))


@pytest.mark.parametrize("case", CASES)
def test_slimtune_reads_them_back_and_writes_them_again(case: str, tmp_path: Path) -> None:
    model = written(tmp_path / "out", **CASES[case][0])
    read, tokenizer = slimtune.load(str(tmp_path / "out"))
    assert same(read, model)
    slimtune.export(read, tokenizer, "compressed-tensors", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    tuned = add_lora(read, r=2)
    losses = two_steps(tuned, pico_inputs(tuned))
    assert losses[1] < losses[0]
    assert all(torch.equal(t.codes, packed(model)[name].codes) for name, t in packed(tuned).items())


@pytest.mark.parametrize("family", ["llama-biased", "llama-tied", "gemma2", "phi3", "llava"])
def test_other_families_are_read_by_slimtune(family: str, tmp_path: Path) -> None:
    model = written(tmp_path / "out", family, **CASES["W8A8 below W4A4"][0])
    read, _ = slimtune.load(str(tmp_path / "out"))
    assert same(read, model)


@pytest.mark.parametrize(
    "change",
    [
        {"dynamic": False},
        {"strategy": "tensor"},
        {"type": "float"},
        {"strategy": "group", "group_size": 0},
        {"strategy": "group", "group_size": None, "dynamic": False},
        {"num_bits": 1},
        {"symmetric": 3},
    ],
    ids=str,
)
def test_inputs_that_are_rounded_in_an_unknown_way_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "out", **FOUR)
    path = tmp_path / "out" / "config.json"
    facts = json.loads(path.read_text())
    facts["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(change)
    path.write_text(json.dumps(facts))
    with pytest.raises(FormatError, match="in an unknown way"):
        slimtune.load(str(tmp_path / "out"))
