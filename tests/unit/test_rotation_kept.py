"""A rotation is kept: with the folder, through every step, and with adapters, which do not load in another basis."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import slimtune
from pico import PICO, VOCAB_SIZE, can_balance, logits, pico_inputs, pico_model, pico_tokenizer, save_pico, with_noise
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export
from slimtune.export.load import load
from slimtune.export.native import write_model
from slimtune.lora.attach import add_lora, load_adapter, save_adapter
from slimtune.lora.merge import merge, merge_packed
from slimtune.recipe.run import run
from slimtune.recipe.schema import recipe_from
from slimtune.recipe.shell import open_model
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import JSON, fingerprint, rotation_of

every_pico = pytest.mark.parametrize("family", PICO)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def windows() -> Tensor:
    return torch.randint(6, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(3))


def saved(folder: Path, family: str = "llama-tied", **options: Any) -> Any:
    """A rotated pico model, written to `folder` as a run does."""
    model = pico_model(family)
    rotate_(model, bind(model), Rotation(**options), tokens=windows())
    folder.mkdir()
    write_model(model, pico_tokenizer(), folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "hadamard", "online": ("r4", "heads")},
        {"kind": "learned", "online": ("r4", "heads")},
        {"balance": True, "online": ("inputs", "r4", "heads")},
    ],
)
@every_pico
def test_a_rotated_model_comes_back_with_its_basis(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "balance": "balance" in options and can_balance(family, options["online"])}
    model = saved(tmp_path / "m", family, **options, steps=3, seed=7)
    back = load(str(tmp_path / "m")).model
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(back, inputs), logits(model, inputs))
    ours, theirs = rotation_of(model), rotation_of(back)
    assert ours is not None and theirs is not None
    assert fingerprint(ours) == fingerprint(theirs)


@every_pico
def test_without_online_transforms_plain_transformers_loads_it(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", family)
    back = type(model).from_pretrained(tmp_path / "m").eval()
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(back, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "hadamard", "online": ("r4", "heads")},
        {"kind": "orthogonal", "online": ("r4", "heads")},
        {"balance": True},
        {"balance": True, "online": ("inputs", "r4", "heads")},
    ],
)
@every_pico
def test_an_exported_adapter_works_on_the_original_model(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = pico_model(family)
    options = {**options, "balance": "balance" in options and can_balance(family, options.get("online", ()))}
    rotate_(model, bind(model), Rotation(**options), tokens=windows())
    wrapped = with_noise(model)
    inputs = pico_inputs(model)
    export(Source(wrapped, pico_tokenizer(), "original"), "peft", tmp_path / "adapter")
    original = pico_model(family)
    before = logits(original, inputs)
    there = PeftModel.from_pretrained(original, str(tmp_path / "adapter")).eval()
    assert relative(logits(there, inputs), logits(wrapped, inputs)) < 1e-5
    assert relative(logits(there, inputs), before) > 1e-2
    assert not (tmp_path / "adapter" / JSON).exists()


def test_an_adapter_keeps_the_hash_of_its_basis_and_loads_in_no_other(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", seed=1)
    wrapped, adapter = with_noise(model), tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(wrapped, adapter)
    again = load_adapter(load(str(tmp_path / "m")).model, adapter)
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(again, inputs), logits(wrapped, inputs))
    with pytest.raises(FormatError, match="another basis") as other:
        load_adapter(saved(tmp_path / "other", seed=2), adapter)
    assert "rotation" in str(other.value.facts["got"])
    with pytest.raises(FormatError, match="another basis") as none:
        load_adapter(pico_model("llama-tied"), adapter)
    assert none.value.facts["wanted"] == "no rotation"
    (adapter / JSON).unlink()
    with pytest.raises(FormatError, match="another basis"):
        load_adapter(load(str(tmp_path / "m")).model, adapter)


@pytest.mark.parametrize("online", [("r4", "heads"), ("inputs", "r4")])
@every_pico
def test_online_transforms_survive_quantizing_adapters_and_merging(family: str, online: tuple[str, ...]) -> None:
    model = pico_model(family)
    inputs = pico_inputs(model)
    rotate_(model, bind(model), Rotation(online=online))
    slimtune.quantize(model, "rtn", bits=8, group_size=8)
    packed = logits(model, inputs)
    assert relative(packed, logits(pico_model(family), inputs)) < 0.05
    wrapped = add_lora(model, r=2)
    torch.testing.assert_close(logits(wrapped, inputs), packed)
    wrapped = with_noise(wrapped.unload())
    tuned = logits(wrapped, inputs)
    kept, _ = merge_packed(copy.deepcopy(wrapped))
    assert relative(logits(kept, inputs), tuned) < 0.1
    merged = merge(wrapped)
    torch.testing.assert_close(logits(merged, inputs), tuned, rtol=1e-4, atol=1e-4)
    assert rotation_of(merged) is not None


@pytest.mark.parametrize("family", ["t5", "t5-gated", "llama-tied"])
def test_a_merged_model_with_a_head_of_its_own_comes_back(family: str, tmp_path: Path) -> None:
    model = pico_model(family)
    rotate_(model, bind(model), Rotation())
    merged = merge(with_noise(model))
    inputs = pico_inputs(merged)
    (tmp_path / "m").mkdir()
    write_model(merged, pico_tokenizer(), tmp_path / "m")
    torch.testing.assert_close(logits(load(str(tmp_path / "m")).model, inputs), logits(merged, inputs))


def test_a_missing_or_foreign_rotation_file_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "m", seed=1)
    saved(tmp_path / "other", seed=2)
    path = tmp_path / "m" / JSON
    text = path.read_text()
    path.unlink()
    with pytest.raises(FormatError, match="the file that says how is missing"):
        load(str(tmp_path / "m"))
    shutil.copy(tmp_path / "other" / JSON, path)
    with pytest.raises(FormatError, match="another rotation's"):
        load(str(tmp_path / "m"))
    facts = json.loads(text)
    for change, what in (
        ({"seed": 9}, "not one rotation's"),
        ({"check": [9.0] * len(facts["check"])}, "builds another rotation"),
        ({"width": "x"}, "damaged"),
        ({"extra": 1}, "damaged"),
        ({"version": 2}, "not a rotation"),
    ):
        path.write_text(json.dumps({**facts, **change}))
        with pytest.raises(FormatError, match=what):
            load(str(tmp_path / "m"))
    path.write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        load(str(tmp_path / "m"))
    path.write_text(text)
    (tmp_path / "m" / "rotation.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="tensors are damaged"):
        load(str(tmp_path / "m"))
    (tmp_path / "m" / "rotation.safetensors").unlink()
    with pytest.raises(FormatError, match="not one rotation's") as caught:
        load(str(tmp_path / "m"))
    assert "rotation.safetensors" in caught.value.facts["remedy"]


@pytest.mark.parametrize("options", [{"online": ["r4", "heads"]}, {"online": ["inputs", "r4"], "balance": True}])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2", "opt", "t5"])
def test_an_adapter_of_the_original_enters_the_basis(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    wrapped, adapter = with_noise(pico_model(family)), tmp_path / "adapter"
    inputs = pico_inputs(wrapped.get_base_model())
    wanted = logits(wrapped, inputs)
    adapter.mkdir()
    save_adapter(wrapped, adapter)
    model = pico_model(family)
    with pytest.raises(RecipeError, match="not rotated"):
        slimtune.rotate_adapter(model, adapter, tmp_path / "turned")
    slimtune.rotate(model, **options, calibration=windows())
    with pytest.raises(FormatError, match="another basis") as caught:
        load_adapter(model, adapter)
    assert "slimtune.rotate_adapter(" in caught.value.facts["remedy"]
    slimtune.rotate_adapter(model, adapter, tmp_path / "turned")
    there = load_adapter(model, tmp_path / "turned")
    assert relative(logits(there, inputs), wanted) < 1e-4
    with pytest.raises(RecipeError, match="not empty"):
        slimtune.rotate_adapter(there, adapter, tmp_path / "turned")
    with pytest.raises(FormatError, match="of a rotated model already"):
        slimtune.rotate_adapter(there, tmp_path / "turned", tmp_path / "again")
    with pytest.raises(FormatError, match="not an adapter folder"):
        slimtune.rotate_adapter(there, tmp_path, tmp_path / "again")


def test_an_adapter_of_another_shape_enters_no_basis(tmp_path: Path) -> None:
    wrapped = with_noise(pico_model(intermediate_size=48))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FormatError, match="does not fit the model"):
        slimtune.rotate_adapter(slimtune.rotate(pico_model()), tmp_path / "adapter", tmp_path / "turned")
    assert not (tmp_path / "turned").exists()


@pytest.mark.parametrize("format", ["safetensors", "decilm", "gptq", "compressed-tensors", "peft", "gguf-lora"])
def test_the_readme_of_an_export_says_that_the_model_is_rotated(format: str, tmp_path: Path) -> None:
    texts = []
    for turned in (False, True):
        model: nn.Module = pico_model("llama")
        if turned:
            slimtune.rotate(model, seed=5)
            basis = rotation_of(model)
        if format in ("gptq", "compressed-tensors"):
            slimtune.quantize(model, "rtn", bits=4, group_size=-1, sym=True)
        model = with_noise(model) if format in ("peft", "gguf-lora") else model
        export(Source(model, pico_tokenizer(), "someone/original"), format, tmp_path / str(turned))
        texts.append((tmp_path / str(turned) / "README.md").read_text())
    assert basis is not None and "rotat" not in texts[0]
    before = texts[0].splitlines()
    added = "\n".join(line for line in texts[1].splitlines() if line not in before)
    assert f"hadamard, seed 5, sha256 {fingerprint(basis)[:12]}" in added and added.count("\n") == 0
    fits = "fits `someone/original`" if "in the basis of the original one" in added else "original` do not fit it"
    assert fits in added and ("basis of the original" in added) == (format in ("peft", "gguf-lora"))


def test_a_second_rotation_and_one_of_a_quantized_model_are_errors() -> None:
    model = pico_model()
    slimtune.rotate(model)
    with pytest.raises(RecipeError, match="rotated already"):
        slimtune.rotate(model)
    packed = slimtune.quantize(pico_model(), "rtn", bits=4, group_size=8)
    with pytest.raises(RecipeError, match="packed weights cannot be rotated") as caught:
        slimtune.rotate(packed)
    assert "before quantize" in caught.value.facts["remedy"]
    with pytest.raises(RecipeError, match="with an adapter cannot be rotated"):
        slimtune.rotate(add_lora(pico_model(), r=2))


@pytest.mark.parametrize("format", ["safetensors", "compressed-tensors", "gptq"])
def test_dense_and_packed_exports_carry_the_rotation(format: str, tmp_path: Path) -> None:
    model = pico_model("llama-tied")
    rotate_(model, bind(model), Rotation())
    if format != "safetensors":
        slimtune.quantize(model, "rtn", bits=4, group_size=-1, sym=True)
    wrapped = with_noise(model)
    export(Source(wrapped, pico_tokenizer(), "original"), format, tmp_path / "out")
    back = load(str(tmp_path / "out")).model
    assert rotation_of(back) is not None
    if format != "safetensors":
        logits(back, pico_inputs(back))
        back = load_adapter(back, tmp_path / "out" / "adapter")
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(back, inputs), logits(wrapped, inputs), rtol=1e-3, atol=1e-3)


def test_online_transforms_are_exported_to_no_other_engine(tmp_path: Path) -> None:
    model = pico_model()
    rotate_(model, bind(model), Rotation(online=("r4",)))
    with pytest.raises(RecipeError, match="no other engine runs"):
        export(Source(model, pico_tokenizer(), "original"), "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_after_its_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the quantize step, the run finds the rotated model, its online transforms and its basis again."""
    data = tmp_path / "text.txt"
    data.write_text("It is what it is, and 2 and 3 is 5.\n" * 20)
    measure = {"evaluate": {"perplexity": {"text": str(data)}, "length": 32}}
    facts = {
        "model": str(save_pico(tmp_path / "base", "llama-tied")),
        "data": {"calibration": {"path": str(data), "length": 32}},
        "steps": [
            {"rotate": {"online": ["r4"]}},
            {"quantize": {"method": "rtn", "group_size": 8}},
            measure,
            {"lora": {"r": 2}},
            measure,
        ],
    }
    whole = run(recipe_from(facts), tmp_path / "whole")
    measured = [metric["value"] for metric in whole["metrics"] if metric["name"] == "text_perplexity"]
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)  # a fresh adapter changes nothing
    with monkeypatch.context() as patch:
        patch.setattr("slimtune.recipe.steps.quantize_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(recipe_from(facts), tmp_path / "run")
    resumed = run(recipe_from(facts), tmp_path / "run", resume=True)
    assert resumed["steps"][0]["facts"]["sha256"] == whole["steps"][0]["facts"]["sha256"]
    models = [open_model(str(tmp_path / name))[1] for name in ("run", "whole")]
    inputs = pico_inputs(models[0])
    torch.testing.assert_close(logits(models[0], inputs), logits(models[1], inputs), rtol=0, atol=0)
    assert (
        json.loads((tmp_path / "run" / "adapter" / JSON).read_text())["sha256"] == whole["steps"][0]["facts"]["sha256"]
    )
    (tmp_path / "run" / "adapter" / JSON).unlink()
    with pytest.raises(FormatError, match="another basis"):
        open_model(str(tmp_path / "run"))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
