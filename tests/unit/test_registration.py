"""`import slimtune` and transformers, in either order, with nothing heavy imported before its time."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pico import pico_model, pico_tokenizer, save_pico
from slimtune import quantize
from slimtune.export.native import write_model
from slimtune.registration import import_after

SLIMTUNE_FIRST = """
import sys
import slimtune
heavy = {"torch", "transformers", "peft", "numpy"} & set(sys.modules)
assert not heavy, heavy
from transformers import AutoModelForCausalLM
"""
TRANSFORMERS_FIRST = """
from transformers import AutoModelForCausalLM
import slimtune
"""
LOAD = """
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
kinds = {type(module).__name__ for module in model.modules()}
assert "QuantLinear" in kinds, kinds
print(model(torch.arange(6, 15)[None]).logits.double().sum().item().hex())
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("quantized")
    model = quantize(pico_model("llama"), "rtn", bits=4, group_size=16)
    write_model(model, pico_tokenizer(), folder)
    with torch.no_grad():
        return folder, model(torch.arange(6, 15)[None]).logits.double().sum().item()


@pytest.mark.parametrize("order", [SLIMTUNE_FIRST, TRANSFORMERS_FIRST], ids=["slimtune first", "transformers first"])
def test_a_quantized_folder_loads_in_a_fresh_process(quantized: tuple[Path, float], order: str) -> None:
    folder, wanted = quantized
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import sys" + order + LOAD, str(folder)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float.fromhex(done.stdout.split()[-1]) == pytest.approx(wanted, rel=1e-6)
    assert "Warning" not in done.stderr


@pytest.fixture
def awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "awaited_module.py").write_text("loaded = True\n")
    (tmp_path / "following_module.py").write_text("import awaited_module\nseen = awaited_module.loaded\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("awaited_module", "following_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "awaited_module"


def test_the_import_follows(awaited: str) -> None:
    finders = list(sys.meta_path)
    import_after(awaited, "following_module")
    assert "following_module" not in sys.modules
    module = importlib.import_module(awaited)
    assert module.loaded
    assert sys.modules["following_module"].seen
    assert sys.meta_path == finders


def test_the_import_is_now_where_the_module_is_there_already(awaited: str) -> None:
    importlib.import_module(awaited)
    import_after(awaited, "following_module")
    assert sys.modules["following_module"].seen


def test_the_following_module_may_come_first(awaited: str) -> None:
    import_after(awaited, "following_module")
    assert importlib.import_module("following_module").seen


@pytest.mark.parametrize("name", ["slimtune.hub", "slimtune.export.load", "transformers.quantizers.auto"])
def test_what_is_imported_first_does_not_matter(name: str) -> None:
    code = (
        f"import slimtune, {name}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; m['slimtune']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_another_import_does_not_set_it_off(awaited: str) -> None:
    import_after("never_imported", "following_module")
    importlib.import_module(awaited)
    assert "following_module" not in sys.modules


def test_evaluate_and_export_are_subpackages_and_functions() -> None:
    import slimtune
    import slimtune.evaluate
    import slimtune.export
    from slimtune import evaluate, export
    from slimtune.export import EXPORTERS

    assert slimtune.evaluate is evaluate and export.EXPORTERS is EXPORTERS
    for function in (evaluate, export):
        with pytest.raises(TypeError, match="tokenizer"):
            function()


def test_every_public_name_is_a_function() -> None:
    import slimtune

    assert all(callable(getattr(slimtune, name)) for name in slimtune.__all__ if name != "__version__")
    assert set(slimtune.__all__) == set(dir(slimtune))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = slimtune.quantise


def test_a_dense_folder_is_none_of_ours(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_pico(tmp_path))
    assert "quantization_config" not in model.config.__dict__
