"""Another package's quantizers and layout go through all of slimtune, and nothing in slimtune knows of them."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pico import VOCAB_SIZE, logits, pico_inputs, pico_model, pico_tokenizer, save_pico, two_steps
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.export import export
from slimtune.export.base import Source
from slimtune.export.load import load
from slimtune.export.native import write_model
from slimtune.lora.attach import add_lora, base_of
from slimtune.lora.merge import merge
from slimtune.quant import QUANTIZERS, QuantLinear
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.layouts import LAYOUTS, Affine

PACKAGE = Path(__file__).resolve().parents[1] / "third_party"
NAMES = ["ternary", "signs"]
ENTRY_POINTS = """
[slimtune.quantizers]
ternary = slimtune_signs:Ternary
signs = slimtune_signs:Signs
[slimtune.layouts]
signs = slimtune_signs:SignLayout
"""


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package as pip leaves it: its modules and its metadata on the path."""
    site = tmp_path_factory.mktemp("site")
    facts = site / "slimtune_signs-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: slimtune-signs\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.delitem(sys.modules, "slimtune_signs", raising=False)
    monkeypatch.syspath_prepend(PACKAGE / "src")
    monkeypatch.syspath_prepend(site)
    gc.freeze()  # quantize_ collects garbage after every block; imported modules need not be gone through
    yield site
    gc.unfreeze()
    sys.modules.pop("slimtune_signs", None)


def quantized(name: str, **setting: Any) -> Any:
    model = pico_model("llama")
    tokens = torch.randint(6, VOCAB_SIZE, (4, 12))
    quantize_(model, bind(model), all_linear(QUANTIZERS[name](**setting)), tokens=tokens)
    return model


def quant_linears(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def test_the_entry_points_are_those_of_its_pyproject() -> None:
    declared = (PACKAGE / "pyproject.toml").read_text()
    for line in ENTRY_POINTS.split("\n"):
        name, _, value = line.partition(" = ")
        assert not value or f'{name} = "{value}"' in declared


def test_tables_list_it_and_import_it_only_when_asked() -> None:
    assert "slimtune_signs" not in sys.modules
    assert set(NAMES) < set(QUANTIZERS) and "rtn" in QUANTIZERS
    assert list(LAYOUTS) == ["affine", "codebook", "e8p", "trellis", "scattered", "signs"]
    assert "slimtune_signs" not in sys.modules
    assert QUANTIZERS["signs"].__module__ == "slimtune_signs"
    with pytest.raises(RecipeError, match="no quantizer named 'sings'") as caught:
        QUANTIZERS["sings"]
    assert "did you mean 'signs'?" in str(caught.value)


def test_the_command_line_lists_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from slimtune import quiet
    from slimtune.cli import main

    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)  # it sets environment variables, for good
    monkeypatch.setattr(sys, "argv", ["slimtune", "list", "quantizers", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    listed = capsys.readouterr().out
    assert json.loads(listed) and all(f'"{name}"' in listed for name in (*NAMES, "optq"))


@pytest.mark.parametrize(("name", "layout"), [("ternary", "affine"), ("signs", "signs")])
def test_it_quantizes_a_model(name: str, layout: str) -> None:
    model = quantized(name)
    layers = quant_linears(model)
    assert len(layers) == 14 and {layer.layout.tag for layer in layers} == {layout}
    assert all(isinstance(layer.layout, Affine) == (name == "ternary") for layer in layers)
    for layer in layers:
        assert len(layer.dequantize().abs().unique(dim=1)) == layer.out_features
    assert bool(torch.isfinite(logits(model, pico_inputs(model))).all())
    with pytest.raises(RecipeError, match="threshold out of range"):
        QUANTIZERS["ternary"](threshold=2.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained_written_read_and_exported(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    wrapped = add_lora(model, r=3)
    inputs = pico_inputs(model)
    before = [p.detach().clone() for layer in quant_linears(wrapped) for p in layer.parameters()]
    losses = two_steps(wrapped, inputs)
    assert losses[1] < losses[0]
    after = [p for layer in quant_linears(wrapped) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trained = logits(wrapped, inputs)

    source = Source(wrapped, pico_tokenizer(), "someone/original")
    for format in ("safetensors", "peft"):
        assert export(source, format, tmp_path / format).max_logit_difference < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "safetensors")
    torch.testing.assert_close(logits(merged, inputs), trained, rtol=1e-4, atol=1e-4)

    folder = tmp_path / "native"
    folder.mkdir()
    write_model(base_of(wrapped), pico_tokenizer(), folder)  # type: ignore[arg-type]
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
    assert {group["layout"] for group in groups} == {LAYOUTS["affine" if name == "ternary" else "signs"].tag}
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(quant_linears(again)) == 14
    with wrapped.disable_adapter():
        assert torch.equal(logits(again, inputs), logits(wrapped, inputs))
    assert torch.equal(logits(load(str(folder)).model, inputs), logits(again, inputs))
    torch.testing.assert_close(logits(merge(wrapped), inputs), trained, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_a_folder_whose_layout_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(quantized("signs"), pico_tokenizer(), tmp_path)
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if "site" not in Path(entry).name or "packages" in entry]
    )
    with pytest.raises(FormatError, match="unknown layout") as caught:
        load(str(tmp_path))
    assert "signs" in str(caught.value) and "affine" in str(caught.value)


def test_a_recipe_names_it(tmp_path: Path) -> None:
    from slimtune import quantize
    from slimtune.export.load import load

    loaded = load(str(save_pico(tmp_path / "pico")))
    model = quantize(loaded.model, method="ternary", threshold=0.6)
    assert len(quant_linears(model)) == 14
