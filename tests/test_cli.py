"""The command line as a person uses it: every verb, what it prints where, and its exit status."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import slimtune
from pico import save_pico
from slimtune.cli import _guarded, app
from slimtune.errors import RecipeError
from slimtune.recipe.document import amount
from slimtune.recipe.shell import recipe_of

VERBS = (
    "run",
    "plan",
    "prune",
    "rotate",
    "quantize",
    "finetune",
    "evaluate",
    "generate",
    "export",
    "report",
    "list",
    "version",
)
Command = Callable[..., tuple[str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command that must succeed; returns its stdout and stderr."""

    def run(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        status = _guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=True))
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, some data, and two finished runs: `four` and `three` bits."""
    folder = tmp_path_factory.mktemp("place")
    save_pico(folder / "base")
    rows = [{"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a in range(5) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wiki.txt").write_text("It is what it is, and 2 and 3 is 5.\n" * 20)
    (folder / "small.yaml").write_text(
        "model: base\ndata:\n  train: sums.jsonl\n  calibration: {path: sums.jsonl, samples: 2, length: 32}\nsteps:\n"
        "  - quantize: {bits: 4, group_size: 8}\n  - lora: {r: 2}\n"
        "  - train: {max_steps: 2, per_device_train_batch_size: 2, max_length: 48, logging_steps: 1}\n"
        "  - evaluate: {perplexity: {wiki: wiki.txt}, length: 32, max_tokens: 96}\n"
    )
    for name, bits in (("four", 4), ("three", 3)):
        arguments = ["run", folder / "small.yaml", f"quantize.bits={bits}", "-o", folder / name]
        assert _guarded(lambda a=arguments: app(list(map(str, a)), standalone_mode=True)) == 0
    return folder


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
from slimtune.cli import app
for verb in {VERBS}:
    try:
        app([verb, "--help"], standalone_mode=True)
    except SystemExit as ended:
        assert ended.code == 0, verb
assert not {{"torch", "transformers", "peft", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"{verb} [OPTIONS]" in done.stdout
    assert done.stderr == ""


def test_the_whole_help_names_every_verb(command: Command) -> None:
    out, _ = command("--help")
    for verb in VERBS:
        assert f"  {verb} " in out
    assert command("version")[0] == command("--version")[0] == f"{slimtune.__version__}\n"


def test_plan_prints_the_resolved_recipe_and_the_estimate(command: Command, place: Path) -> None:
    out, err = command("plan", place / "small.yaml", "seed=5")
    text, _, table = out.partition("\n\n")
    assert yaml.safe_load(text)["seed"] == 5
    assert yaml.safe_load(text)["model"] == str(place / "base")
    for part in ("quantize", "train", "peak memory", "parameters", "GB are available"):
        assert part in table
    assert err == ""


def test_plan_as_json_is_one_object(command: Command, place: Path) -> None:
    out, _ = command("plan", place / "small.yaml", "--json", "--memory", "64KiB")
    facts = json.loads(out)
    assert [step["step"] for step in facts["steps"]] == ["quantize", "lora", "train", "evaluate"]
    assert facts["available_bytes"] == 65536 and len(facts["warnings"]) == 1


def test_progress_goes_to_stderr(command: Command, place: Path, tmp_path: Path) -> None:
    out, err = command("run", place / "small.yaml", "--output", tmp_path / "run")
    assert out == ""
    for part in ("[1/4] quantize", "block 2/2", "trainable parameters", "step 2/2: loss", "perplexity", "report: "):
        assert part in err
    out, err = command("run", place / "small.yaml", "--output", tmp_path / "run", "--resume")
    assert (out, err) == ("", "every step of this run is done\n")


def test_the_default_output_is_named_after_the_recipe(
    command: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command("run", place / "small.yaml", "steps=[lora]")
    assert (tmp_path / "runs" / "small" / "adapter").is_dir()


@pytest.mark.parametrize("style", [("--group-size", "8"), ("--group_size", "8"), ("--group-size=8",)])
def test_quantize_takes_the_fields_of_its_method(
    command: Command, place: Path, tmp_path: Path, style: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    command("quantize", place / "base", "--method", "rtn", *style, "--bits", "3", "--sym", "--seed", "4",
            "--ignore", "*down_proj", "-o", out)  # fmt: skip
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    step = recipe["steps"][0]["quantize"]
    assert (recipe["seed"], step["bits"], step["group_size"], step["sym"], step["ignore"]) == (
        4, 3, 8, True, ["*down_proj"]
    )  # fmt: skip
    skipped = json.loads((out / "report.json").read_text())["steps"][0]["facts"]["skipped"]
    assert sum("down_proj" in entry["name"] for entry in skipped) == 2


def test_rotate_keeps_the_outputs_and_tells_of_outliers(command: Command, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = f"{{path: {place / 'sums.jsonl'}, samples: 2, length: 32}}"
    _, err = command("rotate", place / "base", "--online", "r4", "--seed", "4", "--calibration", data, "-o", out)
    assert "residual: rotated" in err and "kurtosis" in err
    facts = json.loads((out / "report.json").read_text())["steps"][0]["facts"]
    assert (facts["seed"], facts["online"], facts["residual"]) == (4, ["r4"], "rotated")
    assert facts["logit_error"] < 1e-5 and len(facts["layers"]) == 14
    assert "Activations and the rotation" in (out / "report.html").read_text()
    assert json.loads((out / "model" / "rotation.json").read_text())["sha256"] == facts["sha256"]
    texts = [
        command("generate", model, "--prompt", "What", "--max-new-tokens", "8")[0] for model in (place / "base", out)
    ]
    assert texts[0] == texts[1]
    wrong = ["rotate", str(out / "model"), "-o", str(tmp_path / "twice")]
    assert _guarded(lambda: app(wrong, standalone_mode=True)) == 2
    with pytest.raises(RecipeError, match="no such online transform"):
        recipe_of("m", ("rotate",), ["--online", "r5"], "x")


def test_quantize_calibrates_on_a_file(command: Command, place: Path, tmp_path: Path) -> None:
    data = f"{{path: {place / 'sums.jsonl'}, samples: 2, length: 32}}"
    _, err = command("quantize", place / "base", "--calibration", data, "--group-size", "8", "-o", tmp_path / "out")
    assert "calibrating on" in err


def test_prune_takes_the_fields_of_its_step(command: Command, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, err = command("prune", place / "base", "--ratio", ".3", "--importance", "magnitude", "--targets", "[kv, ffn]",
                     "--multiple-of", "4", "-o", out)  # fmt: skip
    facts = json.loads((out / "report.json").read_text())["steps"][0]["facts"]
    assert f"{facts['parameters_after']:,} parameters" in err
    assert abs(facts["removed_ratio"] - 0.3) < 0.05
    assert (out / "model" / "pruning.json").is_file()


def test_finetune_is_lora_and_train(command: Command, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command("finetune", place / "base", "--train", place / "sums.jsonl", "--r", "2", "--max-steps", "2",
            "--learning-rate", "1e-3", "--max_length", "48", "--target-modules", "[q_proj, v_proj]",
            "-o", out)  # fmt: skip
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    lora, train = recipe["steps"][0]["lora"], recipe["steps"][1]["train"]
    assert (lora["r"], lora["target_modules"]) == (2, ["q_proj", "v_proj"])
    assert (train["max_steps"], train["learning_rate"], train["max_length"]) == (2, 1e-3, 48)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_evaluate_measures_a_run_as_its_report_says(command: Command, place: Path, tmp_path: Path) -> None:
    arguments = ("--perplexity", f"wiki={place / 'wiki.txt'}", "--length", 32, "--max-tokens", 96)
    out, err = command("evaluate", place / "four", *arguments, "--json", "--output", tmp_path / "facts.json")
    facts = json.loads(out)
    assert facts == json.loads((tmp_path / "facts.json").read_text())
    assert "perplexity" not in err
    report = json.loads((place / "four" / "report.json").read_text())
    for metric in report["metrics"]:
        got = next(m for m in facts["metrics"] if m["name"] == metric["name"])
        assert set(got) == set(metric)
        assert got["value"] == pytest.approx(metric["value"], rel=1e-6)
    out, err = command("evaluate", place / "base", *arguments)
    assert "wiki perplexity" in err and "bits per weight: 32" in err


def test_generate_answers_with_a_model_a_run_and_an_adapter(command: Command, place: Path) -> None:
    four, base = place / "four", place / "base"
    for arguments in ((base,), (four,), (base, "--adapter", four / "adapter")):
        out, err = command("generate", *arguments, "--prompt", "What is 1 and 2?", "--max-new-tokens", 5)
        assert out.endswith("\n")
        assert err.endswith("tokens/s\n")
        assert "read " in err and "wrote " in err
    say = ("generate", base, "--prompt", "What is", "--max-new-tokens", 5)
    read = {raw: int(command(*say, *raw)[1].split()[1]) for raw in ((), ("--raw",))}
    assert read[("--raw",)] == 7 < read[()]  # the template is left out
    free = [command(*say, "--temperature", 3, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert free[0] == free[1] != free[2]
    with pytest.raises(AssertionError, match="top_p out of range"):
        command(*say, "--top-p", 2)


def test_export_takes_a_run_or_a_model(command: Command, place: Path, tmp_path: Path) -> None:
    out, err = command("export", place / "four", "--format", "peft", "-o", tmp_path / "peft")
    assert out == "" and "read back and compared" in err
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")
    command("export", place / "base", "--format", "safetensors", "-o", tmp_path / "dense")
    with pytest.raises(AssertionError, match="--overwrite replaces it"):
        command("export", place / "base", "--format", "safetensors", "-o", tmp_path / "dense")
    (tmp_path / "dense" / "stale").touch()
    command("export", place / "base", "--format", "safetensors", "-o", tmp_path / "dense", "--overwrite")
    assert not (tmp_path / "dense" / "stale").exists()
    with pytest.raises(AssertionError, match="cannot replace its source"):
        command("export", tmp_path / "dense", "--format", "safetensors", "-o", tmp_path / "dense", "--overwrite")


def test_report_shows_one_run_and_compares_two(command: Command, place: Path, tmp_path: Path) -> None:
    (place / "four" / "report.html").unlink()
    out, err = command("report", place / "four")
    assert "wiki" in out and str(place / "four" / "report.html") in err
    assert (place / "four" / "report.html").is_file()
    out, _ = command("report", place / "four", place / "three", "-o", tmp_path / "both.html")
    assert "four" in out and "three" in out
    assert "<svg" in (tmp_path / "both.html").read_text()
    out, _ = command("report", place / "four", place / "three", "--json")
    assert "three" in out and isinstance(json.loads(out), dict)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("models", {"smollm2-135m"}),
        ("quantizers", {"optq", "rtn"}),
        ("inits", {"default", "gaussian"}),
        ("importances", {"gate", "lora", "wanda"}),
        ("families", {"llama", "qwen2", "t5", "llava"}),
        ("exporters", {"peft", "safetensors", "compressed-tensors", "decilm", "gguf", "gguf-lora"}),
    ],
)
def test_lists_say_what_there_is(command: Command, what: str, names: set[str]) -> None:
    text, _ = command("list", what)
    rows = json.loads(command("list", what, "--json")[0])
    assert set(rows) == {what}
    assert names <= {row["name"] for row in rows[what]}
    assert names <= {line.split()[0] for line in text.splitlines()}


def test_a_quantizer_is_listed_with_its_fields(command: Command) -> None:
    [optq] = [r for r in json.loads(command("list", "quantizers", "--json")[0])["quantizers"] if r["name"] == "optq"]
    fields: dict[str, Any] = {field["name"]: field for field in optq["fields"]}
    assert fields["bits"]["default"] == 4 and "2 to 6, or 8" in fields["bits"]["help"]
    assert "damp_percent" in command("list", "quantizers")[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("24GB", 24 * 10**9), ("512mb", 512 * 10**6), ("1.5 GiB", 3 * 2**29), ("1000", 1000), ("7B", 7)],
)
def test_amounts_of_memory(text: str, wanted: int) -> None:
    assert amount(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-1GB", "0", "nan", "infGB", "1e400"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RecipeError, match="not an amount of memory"):
        amount(text)


def test_an_error_that_is_nobodys_input_keeps_its_traceback() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _guarded(broken)


def test_the_console_script_exits_as_it_should(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("slimtune")
    done = subprocess.run(
        [script, "plan", tmp_path / "none.yaml"], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"slimtune: there is no such recipe\n  where:  {tmp_path / 'none.yaml'}\n"


def test_an_option_for_several_may_stand_several_times() -> None:
    [step] = recipe_of("m", ("rotate",), ["--online", "r4", "--online", "heads", "--kind", "hadamard"], "x").steps
    assert step.online == ("r4", "heads")
    [step] = recipe_of("m", ("prune",), ["--ratio", "0.2", "--targets", "[kv]", "--targets", "ffn"], "x").steps
    assert step.targets == ("kv", "ffn")
    with pytest.raises(RecipeError, match="an option stands twice"):
        recipe_of("m", ("rotate",), ["--kind", "hadamard", "--kind", "learned"], "x")
