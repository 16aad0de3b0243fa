"""Run folders: what is in them, whom they belong to, and what the report says."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimtune
from pico import save_pico
from slimtune.calib.rows import DataSource
from slimtune.errors import RecipeError
from slimtune.recipe.document import read_recipe
from slimtune.recipe.run import run
from slimtune.recipe.schema import recipe_from, to_dict
from slimtune.recipe.shell import export_model, open_model

STEPS: list[Any] = [
    {"quantize": {"bits": 4, "group_size": 16}},
    {"evaluate": {"length": 32, "max_tokens": 128}},
    {"lora": {"r": 4}},
    {"train": {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 48, "learning_rate": 1e-2,
               "logging_steps": 2}},
    {"evaluate": {"length": 32, "max_tokens": 128, "speed": True}},
    {"export": {"format": "peft"}},
    {"export": {"format": "compressed-tensors"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain values of a recipe with everything in it."""
    folder = tmp_path_factory.mktemp("inputs")
    data, text = folder / "sums.jsonl", folder / "wiki.txt"
    rows = [{"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a in range(5) for b in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("It is what it is, and 2 and 3 is 5.\n" * 20)
    sources = {
        "train": str(data),
        "eval": {"path": str(data), "samples": 3},
        "calibration": {"path": str(data), "samples": 4, "length": 32},
    }
    steps = json.loads(json.dumps(STEPS))
    for step in steps:
        if "evaluate" in step:
            step["evaluate"]["perplexity"] = {"wiki": str(text)}
    model = save_pico(folder / "base", intermediate_size=64)
    return {"model": str(model), "name": "whole", "data": sources, "steps": steps}


@pytest.fixture(scope="module")
def finished(facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run, and what it said."""
    folder, said = tmp_path_factory.mktemp("runs") / "whole", []
    run(recipe_from(facts), folder, say=said.append)
    return folder, said


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_layout_is_the_promised_one(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "checkpoints", "export", "model", "recipe.yaml", "report.html", "report.json", "train_log.jsonl"
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "export").iterdir()) == ["compressed-tensors", "peft"]
    for place in ("export/peft", "export/compressed-tensors"):
        assert len((folder / place / "README.md").read_text()) > 100
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (folder / "model").iterdir()}


def test_nothing_in_a_run_folder_is_a_pickle(finished: tuple[Path, list[str]]) -> None:
    suffixes = {path.suffix for path in finished[0].rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".jinja", ".safetensors", ".html", ".yaml", ".md"}


def test_the_resolved_recipe_is_a_recipe(finished: tuple[Path, list[str]], facts: dict[str, Any]) -> None:
    recipe = read_recipe(finished[0] / "recipe.yaml")
    assert to_dict(recipe) == json.loads((finished[0] / "report.json").read_text())["recipe"]
    quantize = recipe.steps[0]
    assert quantize.options["damp_percent"] == 0.01  # type: ignore[union-attr]
    assert (recipe.name, recipe.seed, recipe.model) == ("whole", 0, facts["model"])
    assert recipe.data.calibration == DataSource(**facts["data"]["calibration"])


def test_the_report_has_every_fact(finished: tuple[Path, list[str]]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert set(report) == {"slimtune", "recipe", "environment", "steps", "metrics", "model", "plan"}
    assert report["slimtune"] == slimtune.__version__
    assert {"python", "torch", "transformers", "platform", "cpu", "cores", "memory_bytes"} <= set(report["environment"])
    assert [step["step"] for step in report["steps"]] == [next(iter(step)) for step in STEPS]
    for step in report["steps"]:
        assert set(step) == {"step", "seconds", "peak_rss_bytes", "peak_device_bytes", "facts"}
        assert step["seconds"] > 0 and step["peak_rss_bytes"] > 10**7
    assert len(report["plan"]["steps"]) == len(STEPS)
    assert set(report["model"]) == {"parameters", "bytes", "bits_per_weight"}
    assert report["model"]["bits_per_weight"] == pytest.approx(4 + 24 / 16, rel=0.2)


def test_each_metric_says_after_which_step_it_was_measured(finished: tuple[Path, list[str]]) -> None:
    metrics = json.loads((finished[0] / "report.json").read_text())["metrics"]
    found = {(m["after_step"], m["name"]): m for m in metrics}
    for step in (1, 4):
        perplexity = found[step, "wiki_perplexity"]
        assert perplexity["length"] == 32 and 100 <= perplexity["tokens"] <= 128
        assert math.isfinite(perplexity["value"]) and found[step, "bytes"]["value"] > 0
        assert (step, "bits_per_weight") in found
    assert (4, "prefill_tokens_per_second") in found and (1, "prefill_tokens_per_second") not in found
    assert found[4, "wiki_perplexity"]["value"] < found[1, "wiki_perplexity"]["value"]


def test_quantization_training_and_export_say_what_they_did(finished: tuple[Path, list[str]]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    quantize, _, lora, train, _, peft, packed = (step["facts"] for step in report["steps"])
    assert len(quantize["layers"]) == 14 and all(layer["error"] < 0.1 for layer in quantize["layers"])
    assert {entry["name"] for entry in quantize["skipped"]} == {"lm_head", "model.embed_tokens"}
    assert all(entry["reason"] for entry in quantize["skipped"])
    assert quantize["calibration"]["samples"] == 4
    assert lora["trainable_parameters"] == train["trainable_parameters"] > 0
    assert train["eval_loss_after"] < train["eval_loss_before"]
    assert "«" in train["sample"] and "It is 0." in train["sample"]
    assert train["data"]["rows"] == 20 and train["steps"] == 4
    assert peft["path"] == "export/peft" and packed["path"] == "export/compressed-tensors"
    assert max(peft["max_logit_difference"], packed["max_logit_difference"]) < 1e-3


def test_the_log_is_lines_of_facts(finished: tuple[Path, list[str]]) -> None:
    lines = [json.loads(line) for line in (finished[0] / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 4, 4]
    for line in lines:
        assert line["train"] == 3
        wanted = {"loss", "learning_rate", "tokens_per_second", "peak_rss_bytes"}
        assert "eval_loss" in line or wanted <= set(line)


def test_the_page_stands_alone(finished: tuple[Path, list[str]]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") >= 2
    assert "wiki" in page and "<script src" not in page and "<link" not in page


def test_a_person_can_follow(finished: tuple[Path, list[str]]) -> None:
    text = "\n".join(finished[1])
    for part in ("[1/7] quantize", "[7/7] export", "What is 0 and 0?", "held-out loss", "wiki perplexity", "report:"):
        assert part in text
    assert "warning" not in text


def test_the_model_loads_with_transformers_and_takes_the_adapter(finished: tuple[Path, list[str]]) -> None:
    from peft import PeftModel

    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert any(type(module).__name__ == "QuantLinear" for module in model.modules())
    assert model.config.use_cache is True
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    base = read_recipe(folder / "recipe.yaml").model
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "export" / "peft"))
    assert adapter.peft_config["default"].base_model_name_or_path == base


def test_a_finished_run_is_left_alone(finished: tuple[Path, list[str]], facts: dict[str, Any]) -> None:
    folder, _ = finished
    before, said = fingerprint(folder), []
    with pytest.raises(RecipeError, match="holds a run of this recipe"):
        run(recipe_from(facts), folder)
    report = run(recipe_from(facts), folder, resume=True, say=said.append)
    assert said == ["every step of this run is done"]
    assert report == json.loads((folder / "report.json").read_text())
    assert fingerprint(folder) == before


def short(facts: dict[str, Any], **changes: Any) -> Any:
    return recipe_from({**facts, "steps": [{"quantize": {"method": "rtn", "group_size": 8}}], **changes})


def test_overwriting_starts_again_and_leaves_nothing_of_the_old(facts: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(short(facts), out)
    (out / "export").mkdir()
    (out / "export" / "old").touch()
    with pytest.raises(RecipeError, match="another recipe's run"):
        run(short(facts, seed=1), out, resume=True)
    with pytest.raises(RecipeError, match="both continued and replaced"):
        run(short(facts, seed=1), out, overwrite=True, resume=True)
    run(short(facts, seed=1), out, overwrite=True)
    assert not (out / "export").exists()
    assert "seed: 1" in (out / "recipe.yaml").read_text()
    assert len(json.loads((out / "report.json").read_text())["steps"]) == 1


def test_a_run_of_an_older_version_is_resumed(facts: dict[str, Any], tmp_path: Path) -> None:
    """Its recipe lacks the fields that have come since, which are at their defaults in this one."""
    out, said = tmp_path / "out", []
    run(short(facts), out)
    text = (out / "recipe.yaml").read_text()
    older = re.sub(r"\n +sym: false", "", text)
    assert older != text
    (out / "recipe.yaml").write_text(older)
    run(short(facts), out, resume=True, say=said.append)
    assert said == ["every step of this run is done"]
    with pytest.raises(RecipeError, match="another recipe's run"):
        run(short(facts, steps=[{"quantize": {"method": "rtn", "group_size": 8, "sym": True}}]), out, resume=True)


def test_a_run_is_resumed_from_any_folder(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe names files that lie beside it, or in the folder where it began."""
    home, other, said = tmp_path / "home", tmp_path / "other", []
    shutil.copytree(facts["model"], home / "base")
    (home / "wiki.txt").write_text("It is what it is.\n" * 20)
    other.mkdir()
    steps = "[{evaluate: {perplexity: {wiki: wiki.txt}, length: 16}}]"
    (home / "r.yaml").write_text(f"model: base\ndata: {{train: wiki.txt}}\nsteps: {steps}\n")
    monkeypatch.chdir(home)
    run(read_recipe(Path("r.yaml")), home / "out")
    for folder in (home, other, home / "out", tmp_path):
        monkeypatch.chdir(folder)
        recipe = read_recipe(Path(os.path.relpath(home / "r.yaml")))
        run(recipe, home / "out", resume=True, say=said.append)
        with pytest.raises(RecipeError, match="holds a run of this recipe"):
            run(recipe, home / "out")
    assert said == ["every step of this run is done"] * 4
    shutil.copy(home / "wiki.txt", other)  # another text of this name
    monkeypatch.chdir(other)
    with pytest.raises(RecipeError, match="another recipe's run"):
        run(read_recipe(home / "r.yaml"), home / "out", resume=True)
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    run(read_recipe(Path("r.yaml")), Path("out"), resume=True)


def test_a_run_that_did_nothing_yet_holds_nothing(facts: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "recipe.yaml").write_text("model: another\n")
    run(short(facts), out)
    assert (out / "model" / "config.json").is_file()


def test_a_run_without_changes_still_leaves_a_model(facts: dict[str, Any], tmp_path: Path) -> None:
    run(short(facts, steps=[{"evaluate": {"speed": True}}]), tmp_path / "out")
    got, base = (load_file(Path(f) / "model.safetensors") for f in (tmp_path / "out" / "model", facts["model"]))
    assert got.keys() == base.keys() and all((got[name] == base[name]).all() for name in base)


def test_python_does_what_a_recipe_does(facts: dict[str, Any], finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    data = {key: DataSource(**({"path": v} if isinstance(v, str) else v)) for key, v in facts["data"].items()}
    model, tokenizer = slimtune.load(facts["model"])
    slimtune.quantize(
        model, "optq", tokenizer=tokenizer, calibration=data["calibration"], **facts["steps"][0]["quantize"]
    )
    adapted = slimtune.add_lora(model, **facts["steps"][2]["lora"])
    slimtune.finetune(adapted, tokenizer, data["train"], **facts["steps"][3]["train"])
    wanted = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapted.state_dict().items():
        if "lora_" in name:
            assert (wanted[name.replace(".default", "")] == tensor).all(), name
    metrics = slimtune.evaluate(adapted, tokenizer, **{**facts["steps"][4]["evaluate"], "speed": False})
    report = json.loads((folder / "report.json").read_text())
    found = {m["name"]: m["value"] for m in report["metrics"] if m["after_step"] == 4}
    assert {m["name"]: m["value"] for m in metrics}["wiki_perplexity"] == pytest.approx(found["wiki_perplexity"])


TRAIN = {"train": {"max_steps": 2, "max_length": 48, "learning_rate": 1e-2}}
FEW = {"lora": {"r": 2}}


@pytest.mark.parametrize("first", [[TRAIN], [FEW, TRAIN, {"merge": {}}]], ids=["trained", "merged"])
def test_an_adapter_on_a_base_that_the_run_changed_names_that(
    first: list[Any], facts: dict[str, Any], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    data, out = {"train": facts["data"]["train"]}, tmp_path / "out"
    steps = [*first, FEW, TRAIN, {"export": {"format": "peft"}}]
    run(recipe_from({**facts, "data": data, "steps": steps}), out)
    export_model(str(out), "peft", tmp_path / "again")
    wanted = open_model(str(out))[1]
    for folder in (out / "adapter", out / "export" / "peft", tmp_path / "again"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str((out / "model").resolve())
        assert "no other" in (folder / "README.md").read_text()
        found = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = torch.arange(3, 40)[None]
        assert torch.allclose(found(tokens).logits, wanted(tokens).logits, atol=1e-5)


def test_verbs_ask_what_a_recipe_asks_of_a_run(facts: dict[str, Any], tmp_path: Path) -> None:
    data, out = {"train": facts["data"]["train"]}, tmp_path / "out"
    prune = {"prune": {"importance": "magnitude", "ratio": 0.2}}
    run(recipe_from({**facts, "data": data, "steps": [prune, FEW, TRAIN]}), out)
    for format in ("peft", "gguf-lora"):
        with pytest.raises(RecipeError, match="fits the pruned model alone"):
            export_model(str(out), format, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_verbs_keep_the_dtype_that_a_merge_chose(facts: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe_from({**facts, "data": {}, "steps": [FEW, {"merge": {"dtype": "bfloat16"}}]}), out)
    assert open_model(str(out))[0].model.dtype == torch.bfloat16
    assert open_model(str(out), dtype="float32")[0].model.dtype == torch.float32
    manifest = export_model(str(out), "safetensors", tmp_path / "export")
    assert load_file(tmp_path / "export" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert manifest.bytes < 1.5 * sum(path.stat().st_size for path in (out / "model").iterdir())


def test_python_replaces_no_folder_that_is_not_its_own(facts: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = slimtune.load(facts["model"])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    before = fingerprint(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="not empty and not an export"):
            slimtune.export(model, tokenizer, "safetensors", tmp_path / "thesis", overwrite=overwrite)
        with pytest.raises(RecipeError, match="not empty and not an export"):
            slimtune.rotate_folder(facts["model"], tmp_path / "thesis", overwrite=overwrite)
    assert fingerprint(tmp_path) == before
    for write in (
        lambda **more: slimtune.export(model, tokenizer, "safetensors", tmp_path / "out", **more),
        lambda **more: slimtune.rotate_folder(facts["model"], tmp_path / "rotated", **more),
    ):
        write()
        with pytest.raises(RecipeError, match="the output folder is not empty"):
            write()
        write(overwrite=True)


def test_python_listens_to_every_option_of_training(facts: dict[str, Any]) -> None:
    _, tokenizer = slimtune.load(facts["model"])
    said: list[Any] = []
    for options in ({}, {"packing": True}, {"completion_only_loss": False}):
        adapted = slimtune.add_lora(slimtune.load(facts["model"])[0], r=2)
        slimtune.finetune(
            adapted, tokenizer, DataSource(path=facts["data"]["train"]), max_length=96, facts=said.append, **options
        )
    plain, packed, whole = said
    assert packed.steps < plain.steps
    assert whole.first_loss != plain.first_loss
