"""The Python functions ask of a model in memory what a recipe asks of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtune
from pico import pico_model, pico_tokenizer, save_pico
from slimtune.errors import RecipeError

TOKENIZER = pico_tokenizer()
TRAIN: dict[str, Any] = {"max_steps": 1, "max_length": 48, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}?", "completion": f"{a + 1}."}) + "\n" for a in range(8)))
    return str(path)


def packed(**options: Any) -> nn.Module:
    return slimtune.quantize(pico_model(), "rtn", group_size=8, **options)


def prune(model: nn.Module, **options: Any) -> nn.Module:
    return slimtune.prune(model, ratio=0.2, **{"importance": "magnitude", **options})


Case = tuple[Callable[[str], object], str]
CASES: dict[str, Case] = {
    "lora importance": (lambda _: prune(pico_model(), importance="lora"), "looks at an adapter's gradients"),
    "prune rotated": (lambda _: prune(slimtune.rotate(pico_model(), online=["r4"])), "r4 mixes all channels"),
    "quantize adapted": (
        lambda _: slimtune.quantize(slimtune.add_lora(pico_model(), r=2), "rtn"),
        "with an adapter cannot be quantized",
    ),
    "quantize twice": (lambda _: slimtune.quantize(packed(), "rtn"), "quantized already"),
    "train packed": (lambda data: slimtune.finetune(packed(), TOKENIZER, data, **TRAIN), "packed weights do not train"),
    "distill": (
        lambda data: slimtune.finetune(slimtune.add_lora(pico_model(), r=2), TOKENIZER, data, distill=True, **TRAIN),
        "no unpruned model to learn from",
    ),
    "residual": (
        lambda _: slimtune.add_lora(packed(residual_rank=2), r=4, init="residual"),
        "known to a lower rank",
    ),
    "keep no bits": (
        lambda _: slimtune.merge(slimtune.add_lora(pico_model(), r=2), keep_bits=True),
        "no packed weights to merge into",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_order_that_recipes_refuse_is_refused(case: str, data: str) -> None:
    act, what = CASES[case]
    with pytest.raises(RecipeError, match=what):
        act(data)


@pytest.mark.parametrize("format", ["peft", "gguf-lora"])
def test_an_adapter_of_a_pruned_model_does_not_leave_it(format: str, tmp_path: Path) -> None:
    model = slimtune.add_lora(prune(pico_model()), r=2, base_name="someone/original")
    with pytest.raises(RecipeError, match="fits the pruned model alone"):
        slimtune.export(model, TOKENIZER, format, tmp_path / "out")


@pytest.mark.parametrize("way", ["trained", "merged"])
def test_an_adapter_of_a_changed_base_does_not_name_the_original(way: str, data: str, tmp_path: Path) -> None:
    model, tokenizer = slimtune.load(str(save_pico(tmp_path / "base")))
    changed: nn.Module = model
    if way == "merged":
        changed = slimtune.merge(slimtune.finetune(slimtune.add_lora(model, r=2), tokenizer, data, **TRAIN))
    else:
        slimtune.finetune(model, tokenizer, data, **TRAIN)
    slimtune.export(changed, tokenizer, "safetensors", tmp_path / "own")
    adapted = slimtune.add_lora(changed, r=2)
    with pytest.raises(RecipeError, match="not the model that was loaded"):
        slimtune.export(adapted, tokenizer, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    slimtune.export(adapted, tokenizer, "peft", tmp_path / "out", name=str(tmp_path / "own"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "own")


def test_an_adapter_names_what_it_was_made_for(tmp_path: Path) -> None:
    model = slimtune.add_lora(pico_model(), r=2, base_name="someone/original")
    slimtune.export(model, TOKENIZER, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/original"
    assert "someone/original" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    for name, model in {"dense": pico_model(dtype=torch.bfloat16), "packed": packed().to(torch.bfloat16)}.items():
        slimtune.export(model, TOKENIZER, "safetensors" if name == "dense" else "gptq", tmp_path / name)
        again, _ = slimtune.load(tmp_path / name, dtype=torch.bfloat16)
        assert again.dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="unknown dtype"):
        slimtune.export(pico_model(), TOKENIZER, "safetensors", tmp_path / "other", dtype="fp32")


@pytest.mark.parametrize("kind", [str, Path, lambda path: {"path": path, "samples": 2}])
def test_calibration_is_cut_to_the_models_positions(kind: Callable[[str], Any], data: str) -> None:
    """OPT has learned positions, few of them: longer windows would be outside."""
    model = pico_model("opt")
    assert model.config.max_position_embeddings < 512
    text = Path(data).with_suffix(".txt")
    text.write_text("a number and another one, " * 200)
    slimtune.quantize(model, "optq", bits=4, group_size=8, tokenizer=TOKENIZER, calibration=kind(str(text)))


def test_a_merge_that_keeps_bits_reads_text(data: str) -> None:
    model = slimtune.add_lora(packed(), r=2)
    seen: list[Any] = []
    text = {"path": data, "length": 16, "samples": 2}
    slimtune.merge(model, keep_bits=True, tokenizer=TOKENIZER, calibration=text, facts=seen.append)
    assert seen


def test_one_name_may_be_ignored() -> None:
    model = slimtune.quantize(pico_model(), "rtn", group_size=8, ignore="*.o_proj")
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear


def test_memory_may_be_spoken(tmp_path: Path) -> None:
    save_pico(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "steps": [{"evaluate": {"speed": True}}]}
    assert slimtune.plan(recipe, memory="2GB").available_bytes == 2_000_000_000
