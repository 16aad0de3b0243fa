"""What a plan knows of packed weights: of a folder that holds them, and of those a recipe will make."""

from pathlib import Path
from typing import Any

import pytest

import slimtune
from pico import pico_config, save_pico
from slimtune import load, quantize
from slimtune.errors import SlimtuneError
from slimtune.export.native import write_model
from slimtune.recipe.plan import Plan, plan
from slimtune.recipe.schema import recipe_from

ROUNDED: dict[str, Any] = {"method": "rtn", "bits": 8, "group_size": -1, "sym": True, "activations": {"bits": 8}}
FORMATS = ["compressed-tensors", "gptq", "safetensors", "gguf"]


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing to load: the configuration alone."""
    folder = tmp_path_factory.mktemp("llama")
    pico_config("llama").save_pretrained(folder)
    return folder


def planned(model: Path, *steps: Any) -> Plan:
    facts = {"model": str(model), "data": {"train": {"builtin": "pydocs"}}, "steps": list(steps)}
    return plan(recipe_from(facts))


def export(format: str) -> dict[str, Any]:
    return {"export": {"format": format}}


def refusal(model: Path, *steps: Any) -> str:
    with pytest.raises(SlimtuneError) as caught:
        planned(model, *steps)
    return str(caught.value)


def packed_folder(place: Path, **options: Any) -> Path:
    """A slimtune folder of a pico model that is quantized so."""
    model, tokenizer = load(str(save_pico(place / "dense")))
    (place / "packed").mkdir()
    write_model(quantize(model, **options), tokenizer, place / "packed")
    return place / "packed"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_with_rounded_inputs_is_a_model(bits: int, tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, **{**ROUNDED, "bits": bits})
    planned(folder, {"prune": {"importance": "magnitude"}}, "lora", "train", {"merge": {"keep_bits": True}})
    planned(folder, "lora", "train", "merge", export("safetensors"))  # dense weights, inputs as they are
    planned(folder, export("compressed-tensors"))
    for format in set(FORMATS) - {"compressed-tensors"}:
        assert "cannot say that inputs are rounded" in refusal(folder, "lora", "train", export(format))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_folder_that_a_packed_format_cannot_hold(format: str, tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, method="nf4")
    assert f"{format} cannot hold this layer" in refusal(folder, "lora", export(format))
    planned(folder, "lora", "train", "merge", export("safetensors"))


def test_sixteen_bits_are_no_rounding(tmp_path: Path) -> None:
    save_pico(tmp_path / "dense")
    rounds = {"method": "rtn", "bits": 4, "group_size": -1, "sym": True, "activations": {"bits": 8}}
    none = {"activations": {"bits": 16}, "kv_cache": {"bits": 16}}
    planned(tmp_path / "dense", {"quantize": rounds | none}, export("gptq"))
    planned(tmp_path / "dense", {"quantize": rounds | {"layers": {"*": {"activations": {"bits": 16}}}}})
    some = {"layers": {"*.o_proj": {"activations": {"bits": 8}}}}
    message = refusal(tmp_path / "dense", {"quantize": rounds | none | some}, export("gptq"))
    assert "cannot say that inputs are rounded" in message


def test_a_folder_of_others_with_rounded_inputs_is_known_as_one(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, tokenizer = load(str(packed_folder(tmp_path, **ROUNDED)))
    slimtune.export(model, tokenizer, "compressed-tensors", tmp_path / "out")
    planned(tmp_path / "out", "lora", "train", export("compressed-tensors"))
    for format in set(FORMATS) - {"compressed-tensors"}:
        assert "cannot say that inputs are rounded" in refusal(tmp_path / "out", "lora", "train", export(format))


def test_a_folder_whose_cache_is_rounded_is_known_as_one(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, method="rtn", group_size=8, kv_cache={"bits": 4})
    planned(folder, "lora", "train", {"merge": {"keep_bits": True}})
    for format in FORMATS:
        assert "cannot say that the cache is rounded" in refusal(folder, export(format))


@pytest.mark.parametrize(
    "fields",
    [
        {"activations": {"bits": 8}},
        {"activations": {"bits": 8, "sym": False}},
        {"layers": {"*.down_proj": {"activations": {"bits": 8}}}},
        {"layers": {"*.down_proj": {"bits": 8}}, "bits": 4},
        {"layers": {"*.down_proj": {"group_size": 20}}, "group_size": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("format", ["compressed-tensors"])
def test_zero_points_that_no_reader_takes_are_refused_by_the_plan(
    config_only: Path, fields: dict[str, Any], format: str
) -> None:
    step = {"method": "rtn", "bits": 8, "group_size": -1, **fields}
    steps = "lora", "train", {"merge": {"keep_bits": True}}, export(format)
    said = refusal(config_only, {"quantize": step}, *steps)
    assert "with zero points only where all layers share bits and group size" in said
    assert "steps[4].export" in said and "sym: true" in said and " more" in said
    assert ("model folder" in said) == ("activations" in str(fields))
    planned(config_only, {"quantize": {**step, "sym": True}}, *steps)
    planned(config_only, {"quantize": step}, *steps[:-1])


@pytest.mark.parametrize(
    "fields",
    [
        {"group_size": 8},
        {"group_size": -1},
        {"group_size": 48},
        {"sym": True, "activations": {"bits": 8, "sym": False}},
        {"layers": {"*.down_proj": {"activations": {"bits": 16}}}},
        {"group_size": 8, "layers": {"*proj": {"sym": True, "activations": {"bits": 8}}}},
        {"layers": {"*.down_proj": {"bits": 8}}, "ignore": "*.down_proj"},
    ],
    ids=str,
)
def test_what_readers_take_is_not_refused(config_only: Path, fields: dict[str, Any]) -> None:
    planned(config_only, {"quantize": {"method": "rtn", "bits": 4, **fields}}, export("compressed-tensors"))


@pytest.mark.parametrize("method", ["rtn", "optq"])
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_pooled_adapter_leaves_zero_points_that_no_packed_format_has(
    config_only: Path, method: str, format: str
) -> None:
    pooled = {"quantize": {"method": method, "group_size": 8}}, {"lora": {"pooled": True}}, "train"
    kept = {"merge": {"keep_bits": True}}
    said = refusal(config_only, *pooled, kept, export(format))
    assert "a pooled adapter" in said and "steps[4].export" in said
    assert "a pooled adapter" in refusal(config_only, *pooled, kept, "lora", "train", kept, export(format))
    planned(config_only, *pooled, export(format), kept, export("safetensors"))
    planned(config_only, *pooled, "merge", {"quantize": {"method": "rtn", "group_size": 8}}, export(format))
    planned(config_only, pooled[0], "lora", "train", kept, export(format))


SCALES = {"train": {"scales": True}}
POOLED = {"lora": {"pooled": True}}


def test_scales_that_do_not_train_are_refused_by_the_plan(config_only: Path, tmp_path: Path) -> None:
    said = refusal(config_only, {"quantize": {"method": "nf4"}}, "lora", SCALES)
    assert "no scales to train" in said and "steps[2].train.scales" in said and "double_quant: false" in said
    some = {"method": "nf4", "layers": {"*.q_proj": {"double_quant": False}}}
    for facts in ({"method": "nf4", "double_quant": False}, some, {"method": "quip"}, {"method": "hqq"}):
        planned(config_only, {"quantize": facts}, "lora", SCALES)
    folder = packed_folder(tmp_path, method="nf4")
    planned(folder, "lora", "train")
    assert "double_quant: false" in refusal(folder, "lora", SCALES)
    planned(folder, "lora", "train", "merge", {"quantize": {"method": "rtn", "group_size": 8}}, "lora", SCALES)


@pytest.mark.parametrize("method", ["nf4", "quip"])
def test_groups_that_cannot_be_pooled_are_refused_by_the_plan(config_only: Path, method: str) -> None:
    said = refusal(config_only, {"quantize": {"method": method}}, POOLED, "train")
    assert "no adapted layer has quantization groups to pool" in said
    assert "steps[1].lora.pooled" in said and "rtn, optq or hqq" in said
    planned(config_only, {"quantize": {"method": method}}, "lora", "train")


def test_what_is_pooled_is_adapted(config_only: Path, tmp_path: Path) -> None:
    step = {"quantize": {"method": "rtn", "group_size": 8, "ignore": "*.q_proj"}}
    planned(config_only, step, POOLED, "train")
    narrow = {"lora": {"pooled": True, "target_modules": ["q_proj"]}}
    assert "quantization groups to pool" in refusal(config_only, step, narrow)
    assert "quantization groups to pool" in refusal(config_only, POOLED)
    assert "quantization groups to pool" in refusal(packed_folder(tmp_path, method="nf4"), POOLED)


def test_a_folder_whose_zero_points_are_no_whole_numbers_is_known_as_one(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, method="hqq", group_size=8)
    planned(folder, export("safetensors"))
    for format in ("compressed-tensors", "gptq"):
        assert "no whole numbers" in refusal(folder, export(format))
