"""Every recipe that is shipped runs from end to end on a model small enough for a test."""

import json
from pathlib import Path

import pytest

from pico import save_pico
from slimtune.calib.rows import BUILTINS
from slimtune.recipe.document import read_recipe
from slimtune.recipe.run import run
from slimtune.recipe.schema import STEPS, Evaluate

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
SMALL = {
    "prune": ["prune.every=1"],
    "quantize": ["quantize.group_size=8"],
    "train": ["train.max_steps=2", "train.max_length=192", "train.logging_steps=1", "train.save_steps=1"],
    "evaluate": ["evaluate.max_tokens=256", "evaluate.length=64", "evaluate.max_new_tokens=4"],
    "calibration": ["data.calibration.samples=2", "data.calibration.length=32"],
}


def test_there_is_a_recipe_to_start_from() -> None:
    assert "quickstart" in [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Short rows, and few: this tokenizer makes a token of every letter.
    rows = BUILTINS["pydocs"]
    monkeypatch.setitem(BUILTINS, "pydocs", lambda split: [row for row in rows(split) if len(str(row)) < 200][:150])
    two_sided = path.stem.startswith("t5")
    model = (
        save_pico(tmp_path / "pico", "t5")
        if two_sided
        else save_pico(tmp_path / "pico", "llama-tied", max_position_embeddings=512)
    )
    shipped = read_recipe(path)
    names = {step.name for step in shipped.steps}
    overrides = [f"model={model}", *(line for name in names for line in SMALL.get(name, ()))]
    if two_sided:
        overrides = [line for line in overrides if not line.startswith("evaluate.")]
    if shipped.data.calibration is not None:
        overrides += SMALL["calibration"]
    if shipped.data.eval is not None:
        overrides.append("data.eval.samples=2")
    recipe, said = read_recipe(path, overrides), []
    report = run(recipe, tmp_path / "run", say=said.append)
    folder = tmp_path / "run"
    assert [step["step"] for step in report["steps"]] == [step.name for step in shipped.steps]
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.html").stat().st_size > 5000
    assert (folder / "model" / "config.json").is_file()
    assert (folder / "adapter" / "adapter_config.json").is_file() == ("lora" in names and "merge" not in names)
    for step in recipe.steps:
        if step.name == "export":
            assert (folder / "export" / step.format / "README.md").is_file()  # type: ignore[union-attr]
    measured = {(metric["after_step"], metric["name"]) for metric in report["metrics"]}
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Evaluate):
            assert {(number, f"{name}_perplexity") for name in step.perplexity} <= measured
            assert {(number, f"{name}_accuracy") for name in step.accuracy} <= measured
            assert {(number, f"{name}_rouge2") for name in step.rouge} <= measured
    train = [step["facts"] for step in report["steps"] if step["step"] == "train"]
    assert all(facts["steps"] == 2 and facts["data"]["rows"] > 5 for facts in train)
    assert not [line for line in said if "warning" in line]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_explains_itself(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert {step.name for step in read_recipe(path).steps} <= set(STEPS)
