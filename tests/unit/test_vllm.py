"""Folders for vLLM: R4 in blocks, in the form of compressed-tensors, whose own transform is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import Space, bind
from slimtune.errors import FormatError, RecipeError, ShapeError
from slimtune.export import Source, export
from slimtune.export.load import load
from slimtune.lora.attach import add_lora
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.legality import check_order
from slimtune.recipe.plan import plan
from slimtune.recipe.schema import recipe_from
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.online import attach_online_
from slimtune.rotate.options import Rotation

pytest.importorskip("compressed_tensors")


def packed(block_size: int = 8, online: tuple[str, ...] = ("r4",), family: str = "llama") -> Any:
    model = pico_model(family)
    rotate_(model, bind(model), Rotation(online=online, block_size=block_size))
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=-1, sym=True)))
    attach_online_(model)
    return model


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("block_size", [2, 8, 12])
def test_blocks_leave_the_outputs_alone(family: str, block_size: int) -> None:
    model = pico_model(family)
    inputs = pico_inputs(model)
    wanted = logits(model, inputs)
    width = next(port.in_features for port in bind(model).ports if port.reads is Space.FFN)
    if width % block_size:
        with pytest.raises(ShapeError, match="does not divide"):
            rotate_(model, bind(model), Rotation(online=("r4",), block_size=block_size))
    else:
        rotate_(model, bind(model), Rotation(online=("r4",), block_size=block_size))
        torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-4, atol=1e-4)


def test_the_folder_says_what_compressed_tensors_would_do(tmp_path: Path) -> None:
    from compressed_tensors.transform import TransformConfig, TransformFactory

    model = packed()
    wanted = logits(model, pico_inputs(model))
    manifest = export(Source(model, pico_tokenizer(), "original"), "vllm", tmp_path / "out")
    assert manifest.max_logit_difference < 1e-4

    torch.testing.assert_close(logits(load(str(tmp_path / "out")).model, pico_inputs(model)), wanted)
    (tmp_path / "out" / "rotation.json").rename(tmp_path / "kept")
    with pytest.raises(FormatError, match="the file that says how is missing"):
        load(str(tmp_path / "out"))
    (tmp_path / "kept").rename(tmp_path / "out" / "rotation.json")

    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = TransformConfig(**facts["transform_config"]).config_groups["R4"]
    factory = TransformFactory.from_scheme(scheme, name="R4")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    off = logits(stock, pico_inputs(stock))
    assert float((off - wanted).abs().max()) > 0.01  # as the README says
    files = load_file(tmp_path / "out" / "model.safetensors")
    there = next(args for args in scheme.apply if args.location == "input")
    for name in there.targets:
        layer = stock.get_submodule(name)
        transform = factory.create_transform(layer, there)
        assert torch.equal(transform.weight.data, files[f"{name}.R4_input.weight"])
        layer.register_forward_pre_hook(lambda _, args, transform=transform: (transform(args[0]), *args[1:]))
    torch.testing.assert_close(logits(stock, pico_inputs(stock)), wanted, rtol=1e-4, atol=1e-4)
    assert "**not transformers**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 0}, "one kind of online transform"),
        ({"online": ("r4", "heads")}, "one kind of online transform"),
    ],
)
def test_what_vllm_does_not_run_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = packed(**options)
    with pytest.raises(RecipeError, match=reason):
        export(Source(model, pico_tokenizer(), "original"), "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_language_model_of_a_multimodal_one_is_named_as_transformers_and_as_vllm_do(tmp_path: Path) -> None:
    """The names of vLLM's LLaVA are those of the file; its vision tower has linears that nothing turns."""
    from compressed_tensors.transform import TransformConfig, TransformFactory
    from compressed_tensors.utils import is_match

    model = packed(family="llava")
    wanted = logits(model, pico_inputs(model))
    manifest = export(Source(model, pico_tokenizer(), "original"), "vllm", tmp_path / "out")
    assert manifest.max_logit_difference < 1e-4
    torch.testing.assert_close(logits(load(str(tmp_path / "out")).model, pico_inputs(model)), wanted)

    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = TransformConfig(**facts["transform_config"]).config_groups["R4"]
    factory = TransformFactory.from_scheme(scheme, name="R4")
    there = next(args for args in scheme.apply if args.location == "input")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    turned = [name for name, module in stock.named_modules() if is_match(name, module, there.targets)]
    assert turned == [port.name for port in bind(model).ports if port.reads is Space.FFN]
    files = load_file(tmp_path / "out" / "model.safetensors")
    for name in turned:
        file = name.replace("model.language_model.", "language_model.model.")
        layer = stock.get_submodule(name)
        assert is_match(file, layer, there.targets)
        transform = factory.create_transform(layer, there)
        assert torch.equal(transform.weight.data, files[f"{file}.R4_input.weight"])
        layer.register_forward_pre_hook(lambda _, args, transform=transform: (transform(args[0]), *args[1:]))
    torch.testing.assert_close(logits(stock, pico_inputs(stock)), wanted, rtol=1e-4, atol=1e-4)


def test_a_family_whose_names_on_disk_are_not_known_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtune.export.vllm.NESTED", "another.")
    save_pico(tmp_path / "m", "llava")
    rotate, quantize = (
        {"rotate": {"online": ["r4"], "block_size": 8}},
        {"quantize": {"method": "rtn", "group_size": -1}},
    )
    steps = [rotate, quantize, {"export": {"format": "vllm"}}]
    with pytest.raises(RecipeError, match="has not been written for this family"):
        plan(recipe_from({"model": str(tmp_path / "m"), "steps": steps}))


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    model = packed()
    with pytest.raises(RecipeError, match="adapter other inputs"):
        export(Source(add_lora(model, r=2), pico_tokenizer(), "original"), "vllm", tmp_path / "out")


@pytest.mark.parametrize("block_size", [-1, 1, 8])
def test_a_block_size_is_of_r4(block_size: int) -> None:
    with pytest.raises(RecipeError, match="block_size is of r4"):
        Rotation(block_size=block_size)


def test_recipes_know_it_before_they_run() -> None:
    quantize = {"quantize": {"method": "rtn", "bits": 4}}

    def order(*steps: dict[str, Any]) -> None:
        check_order(recipe_from({"model": "m", "steps": list(steps)}))

    order({"rotate": {"online": ["r4"], "block_size": 128}}, quantize, {"export": {"format": "vllm"}})
    for online in ({"online": ["r4"]}, {"online": ["r4"], "block_size": 96}, {"online": []}):
        with pytest.raises(RecipeError, match="one kind of online transform"):
            order({"rotate": online}, quantize, {"export": {"format": "vllm"}})
    with pytest.raises(RecipeError, match="no packed weights"):
        order({"rotate": {"online": ["r4"], "block_size": 128}}, {"export": {"format": "vllm"}})
    with pytest.raises(RecipeError, match="no other engine runs"):
        order({"rotate": {"online": ["r4"], "block_size": 128}}, quantize, {"export": {"format": "gptq"}})
