"""Wrong input, from the command line: exit status 2, one message that names the thing and the remedy, nothing lost."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import slimtune
import slimtune.recipe.blocks
import slimtune.recipe.plan
import slimtune.recipe.shell
from pico import save_pico
from slimtune.cli import _guarded, app
from slimtune.errors import RecipeError, SlimtuneError
from slimtune.recipe.options import options_of

Command = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command that must be refused, and returns its one message."""

    def command(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        got = _guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=True))
        out, err = capsys.readouterr()
        assert got == status, err
        assert out == ""
        assert err.count("slimtune: ") == 1
        assert "Traceback" not in err
        return err

    return command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a in range(4) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, model: Path, data: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {model}\ndata:\n  train: {data}\n  calibration: {{path: {data}, samples: 2, length: 32}}\nsteps:\n"
        "  - quantize: {bits: 4, group_size: 8}\n  - lora: {r: 2}\n"
        "  - train: {max_steps: 2, per_device_train_batch_size: 2, max_length: 48}\n"
    )
    return path


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sed=1", ["got:    sed", "did you mean 'seed'"]),
        ("quantize.bit=3", ["steps[0].quantize", "got:    bit", "did you mean 'bits'"]),
        ("quantize.method=optk", ["steps[0].quantize.method", "got:    optk", "did you mean 'optq'"]),
        ("train.learning_rat=1", ["steps[2].train", "did you mean 'learning_rate'"]),
        ("quantize.bits=7", ["bits out of range", "steps[0].quantize", "got:    7", "(2, 3, 4, 5, 6, 8)"]),
        ("quantize.group_size=28", ["divides no layer's width", "got:    28", "32, 40, 48", "remedy:"]),
        ("dtype=float33", ["dtype", "'float33'", "'float32', 'bfloat16' or 'float16'"]),
        ("data.train.path=nowhere.jsonl", ["no such data file", "nowhere.jsonl"]),
        ("steps=[]", ["the recipe has no steps"]),
        ("model=nowhere", ["there is no such model", "got:    nowhere", "smollm2-135m"]),
        ("quantize", ["an override is key=value"]),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_recipe_that_says_something_wrong(
    refused: Command, recipe: Path, tmp_path: Path, verb: str, override: str, parts: list[str]
) -> None:
    where = ["--output", tmp_path / "out"] if verb == "run" else []
    if override.startswith("data.train."):
        recipe.write_text(recipe.read_text().replace("train: " + str(tmp_path / "sums.jsonl"), "train: {path: x.txt}"))
    message = refused(verb, recipe, override, *where)
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["an empty data file", "sums.jsonl"]),
        ("\n \n", ["an empty data file"]),
        ("[]", ["row 1", "not an object"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ["row 2", "completion"]),
        ('{"prompt": "a", "completion": "b"}\n3\n', ["row 2", "not an object"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt: 3\n', ["malformed JSON", "line 2"]),
        ('{"question": "a", "answer": "b"}\n', ["question", "rename the columns"]),
        ('{"prompt": "a", "completion": 3}\n', ["row 1"]),
    ],
)
def test_data_without_what_is_needed(refused: Command, recipe: Path, data: Path, text: str, parts: list[str]) -> None:
    data.write_text(text)
    message = refused("run", recipe, "--output", data.parent / "out")
    assert str(data) in message
    for part in parts:
        assert part in message


def test_a_model_folder_without_a_config(refused: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("run", recipe, f"model={tmp_path / 'empty'}", "--output", tmp_path / "out")
    assert "it has no config.json" in message and str(tmp_path / "empty") in message


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def cut_in_the_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00")


def leave_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def rename_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))


def invent_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "perceptron-9000"}')


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (truncate, ["truncated", "model.safetensors"]),
        (cut_in_the_header, ["truncated", "model.safetensors"]),
        (leave_a_pickle, ["no safetensors weights", "pytorch_model.bin", "pickles can run code"]),
        (remove_weights, ["no safetensors weights", "no weight file"]),
        (break_config, ["config.json is not JSON"]),
        (rename_family, ["gpt_neox"]),
        (invent_family, ["perceptron-9000", "slimtune list families"]),
    ],
)
def test_a_damaged_or_unknown_model(
    refused: Command,
    recipe: Path,
    model: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    parts: list[str],
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    damage(broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("model: another\n")
    (tmp_path / "out" / "report.json").write_text("{}")
    before = fingerprint(tmp_path)
    for arguments in (
        ("run", recipe, f"model={broken}", "--output", tmp_path / "out", "--overwrite"),
        ("evaluate", broken, "--speed"),
    ):
        message = refused(*arguments)
        for part in parts:
            assert part in message
    assert fingerprint(tmp_path) == before  # not even with --overwrite is anything removed for a run that cannot begin


@pytest.mark.parametrize(
    ("arguments", "where", "parts"),
    [
        ("quantize --bits 7", "--bits", ["bits out of range", "got:    7"]),
        ("quantize --bits x", "--bits", ["got:    'x'"]),
        ("quantize --damp-percent 2", "--damp-percent", ["damp_percent out of range"]),
        ("quantize --method optk", "--method", ["did you mean 'optq'"]),
        ("quantize", "--calibration", ["remedy: add --calibration FILE, or use --method rtn\n"]),
        ("quantize --calibration {pth:x}", "--calibration", ["did you mean 'path'"]),
        ("quantize --calibration {builtin:\u00a0x}", "--calibration", []),
        ("quantize --method rtn --activations {bits:\u00a099}", "--activations", []),
        ("quantize --method rtn --seed -3", "--seed", ["0 to 4294967295"]),
        ("quantize --method rtn --dtype int8", "--dtype", []),
        ("rotate --block-size 128", "--block-size", ["wanted: at least 2, with --online [r4]"]),
        ("rotate --online r9", "--online", []),
        ("prune --ratio 0.5 --importance nothing", "--importance", ["remedy: use one of: flap"]),
        ("prune --ratio 0.5", "--calibration", ["got:    --importance wanda"]),
        (
            "prune --ratio 0.99 --importance magnitude",
            "--ratio",
            ["lower --ratio, add --targets, or lower --multiple-of"],
        ),
        ("prune --ratio 0.5 --importance magnitude --schedule cubic", "slimtune prune", ["is a recipe (slimtune run)"]),
        ("finetune --r 0 --train {data}", "--r", ["r out of range"]),
        ("finetune --r 4", "--train", ["remedy: add --train FILE\n"]),
        ("finetune --train {data} --init pissa --init-sketch x", "--init-sketch", []),
        ("finetune --train {data} --scales", "--scales", ["leave out --scales; more than one step is a recipe"]),
        ("finetune --train {data} --fake-quant 4", "--fake-quant", []),
        ("finetune --train {data} --target-modules nothing", "--target-modules", []),
        ("evaluate --length 1", "--length", ["at least 2"]),
        ("evaluate --perplexity {data} --length 100000", "--length", []),
        ("evaluate --tasks nothing", "--tasks", []),
        ("evaluate --dtype int3", "--dtype", []),
        ("export --format pefd", "--format", ["did you mean 'peft'"]),
        ("export --format safetensors --rank 3", "--rank", []),
        ("export --format gguf --quantization q9", "--quantization", []),
        ("generate --prompt x --max-new-tokens 0", "--max-new-tokens", []),
        ("generate --prompt x --top-p 2", "--top-p", []),
    ],
)
def test_messages_of_verbs_name_the_option_that_was_typed(
    arguments: str, where: str, parts: list[str], refused: Command, model: Path, data: Path, tmp_path: Path
) -> None:
    verb, *rest = arguments.split(" ")
    output = ["--output", tmp_path / "out"] if verb not in ("evaluate", "generate") else []
    rest = [word.replace("{data}", str(data)).replace("\u00a0", " ") for word in rest]
    message = refused(verb, model, *rest, *output)
    assert re.search(rf"\n  where:  {re.escape(where)}(, .*|: .*)?\n", message), message
    for part in parts:
        assert part in message
    assert "steps[" not in message and "data:" not in message and "{calibration" not in message


def test_a_warning_of_a_verb_and_keys_inside_an_option_stay_what_they_are() -> None:
    options = options_of("finetune", ("lora", "train"), ["--r", "64"])
    assert options.line("warning: steps[0].lora: rank 64 is") == "warning: slimtune finetune: rank 64 is"
    assert options.line("  | r: 3, steps[0].lora") == "  | r: 3, steps[0].lora"
    odd = options_of("quantize", ("quantize",), ["--layers.model[0=3", "--x(=3", "--"])
    assert odd.text("lower bits, or x(") == "lower --bits, or x("
    inside = RecipeError("unknown key", where="steps[1].train.fake_quant", remedy="did you mean 'max_steps'?")
    assert "did you mean 'max_steps'?" in str(options.renamed(inside))


def test_an_output_folder_that_holds_something_else(refused: Command, recipe: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    before = fingerprint(full)
    for flags in ((), ("--resume",), ("--overwrite",)):
        assert "not empty and not a run" in refused("run", recipe, "--output", full, *flags)
        assert fingerprint(full) == before
    for place in (full / "thesis.txt", full / "thesis.txt" / "run"):
        assert "cannot be made" in refused("run", recipe, "--output", place)
    assert fingerprint(full) == before


def test_an_output_is_looked_at_before_the_work(
    refused: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("nothing is loaded for an output that cannot be")

    monkeypatch.setattr(slimtune.recipe.shell, "load", worked)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for arguments in (
        ("evaluate", model, "--speed", "--output", tmp_path / "deep" / "m.json"),
        ("export", model, "--format", "safetensors", "--output", tmp_path / "out"),
        ("report", model, "--output", tmp_path / "r.html"),
    ):
        message = refused(*arguments)
        assert "cannot be made" in message and f"{tmp_path} may not be written to" in message
        assert "remedy: choose another --output" in message


def test_an_output_folder_that_holds_another_run(refused: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "other.jsonl" in refused("run", recipe, "data.train=other.jsonl", "--output", out)
    assert _guarded(lambda: app(["run", str(recipe), "--output", str(out)], standalone_mode=True)) == 0
    before = fingerprint(out)
    message = refused("run", recipe, "quantize.bits=3", "--output", out)
    assert "another recipe's run" in message
    assert "bits: 4" in message and "bits: 3" in message
    assert "another recipe's run" in refused("run", recipe, "quantize.bits=3", "--output", out, "--resume")
    message = refused("run", recipe, "--output", out)
    assert "holds a run of this recipe" in message and "--resume" in message and "--overwrite" in message
    message = refused("run", recipe, f"model={out / 'model'}", "steps=[train]", "--output", out, "--overwrite")
    assert "packed weights do not train" in message
    message = refused("run", recipe, f"model={out / 'model'}", "steps=[lora]", "--output", out, "--overwrite")
    assert "reads from the run it would overwrite" in message
    assert fingerprint(out) == before


def test_a_full_disk(refused: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(slimtune.recipe.blocks, "save_file", full)
        message = refused("run", recipe, "--output", out)
    assert "the disk is full" in message and "--resume" in message
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert "the disk is full" in refused("run", recipe, "--output", out, "--resume")
    assert not list(out.rglob("*.partial"))
    arguments = ["run", str(recipe), "--output", str(out), "--resume"]
    assert _guarded(lambda: app(arguments, standalone_mode=True)) == 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_too_little_memory_is_a_warning(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slimtune.recipe.plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=0, total=1))
    arguments = ["run", str(recipe), "train.max_steps=1", "--output", str(tmp_path / "out")]
    assert _guarded(lambda: app(arguments, standalone_mode=True)) == 0
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1
    assert "per_device_train_batch_size" in err or "samples" in err


def test_a_diverging_training_exits_1_and_keeps_what_there_was(refused: Command, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = ("train.learning_rate=1e30", "train.max_grad_norm=0", "train.max_steps=6", "train.logging_steps=1")
    message = refused("run", recipe, *overrides, "--output", out, status=1)
    assert "not a finite number" in message and "learning_rate" in message
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("list", "quantisers"), ["did you mean 'quantizers'"]),
        (("plan", "{recipe}", "--memory", "plenty"), ["--memory", "plenty", "24GB"]),
        (("plan", "{recipe}", "--memory", "-3GB"), ["not an amount of memory"]),
        (("plan", "{recipe}", "--memory", "inf"), ["not an amount of memory"]),
        (("plan", "{folder}/nowhere.yaml"), ["there is no such recipe", "nowhere.yaml"]),
        (("run", "{folder}"), ["there is no such recipe"]),
        (("quantize", "{model}", "--bitts", "4", "--output", "{folder}/out"), ["option", "--bitts", "'--bits'"]),
        (("quantize", "{model}", "--calibraton", "x", "--output", "{folder}/out"), ["'--calibration'"]),
        (("quantize", "{model}", "--method", "optk", "--output", "{folder}/out"), ["optk", "did you mean 'optq'"]),
        (("quantize", "{model}", "4", "--output", "{folder}/out"), ["an option begins with --", "got:    4"]),
        (("quantize", "{model}", "--output", "{folder}/out"), ["needs calibration text"]),
        (("finetune", "{model}", "--max-stepz", "1", "--output", "{folder}/out"), ["--max-stepz", "'--max-steps'"]),
        (("finetune", "{model}", "--r", "--train", "x.jsonl", "--output", "{folder}/out"), ["--r", "integer"]),
        (("finetune", "{model}", "--output", "{folder}/out"), ["nothing to train on"]),
        (("evaluate", "{model}", "--speed", "--dtype", "int4"), ["unknown dtype", "int4"]),
        (("evaluate", "{model}", "--perplexity", "nowhere.txt"), ["no such data file", "nowhere.txt"]),
        (
            ("evaluate", "{model}", "--perplexity", "wiki/test.txt", "--perplexity", "ptb/test.txt.gz"),
            [
                "two texts of one name",
                "test: wiki/test.txt and ptb/test",
                "--perplexity ptb-test=ptb/test.txt.gz",
            ],
        ),
        (("evaluate", "{model}", "--perplexity", "a=x.txt", "--perplexity", "a=y.txt"), ["two texts of one name"]),
        (("evaluate", "{folder}/nowhere", "--speed"), ["there is no such model"]),
        (("generate", "{model}", "--prompt", "a", "--adapter", "{folder}"), ["not an adapter folder"]),
        (("export", "{model}", "--format", "ggml", "--output", "{folder}/out"), ["exporter", "ggml"]),
        (("export", "{model}", "--format", "peft", "--output", "{folder}/out"), ["adapter"]),
        (("export", "{model}", "--format", "safetensors", "--output", "{folder}"), ["not empty and not an export"]),
        (("export", "{model}", "--format", "safetensors", "--output", "{recipe}"), ["not empty and not an export"]),
        (("report", "{folder}"), ["no report here", "slimtune run"]),
        (("report", "{recipe}"), ["no report here", "slimtune run"]),
        (("report", "{folder}", "--output", "{folder}"), ["cannot be made", "is a folder"]),
        (("evaluate", "{model}", "--speed", "--output", "{folder}"), ["cannot be made", "is a folder"]),
        (("evaluate", "{model}", "--speed", "--output", "{recipe}/a/m.json"), ["cannot be made", "is a file"]),
        (("export", "{model}", "--format", "gguf", "--output", "{recipe}/out"), ["cannot be made", "is a file"]),
    ],
)
def test_a_command_that_asks_for_what_there_is_not(
    refused: Command, recipe: Path, model: Path, tmp_path: Path, arguments: tuple[str, ...], parts: list[str]
) -> None:
    before = fingerprint(tmp_path)
    message = refused(*(a.format(recipe=recipe, model=model, folder=tmp_path) for a in arguments))
    for part in parts:
        assert part in message
    assert fingerprint(tmp_path) == before


def test_broken_yaml_names_the_line(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nsteps:\n  - quantize: {bits: 4]\n  - lora\n")
    message = refused("plan", tmp_path / "r.yaml")
    assert "not valid YAML" in message and "r.yaml, line 3" in message


@pytest.mark.parametrize(
    "arguments", [["quantise"], ["run"], ["plan", "x", "--jsn"], ["quantize", "m"], ["evaluate", "m", "--length", "x"]]
)
def test_a_command_line_that_is_not_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(lambda: app(arguments, standalone_mode=True)) == 2
    err = capsys.readouterr().err
    assert "Usage: " in err and "Traceback" not in err


def test_a_tokenizer_of_another_model(refused: Command, recipe: Path, tmp_path: Path) -> None:
    """It has tokens that the model has no embedding of."""
    small = save_pico(tmp_path / "small", vocab_size=40)
    said = ["not in the model's vocabulary", "wanted: 0 to 39", "the model's own tokenizer"]
    out = ("--output", tmp_path / "out")
    for arguments in (
        ("generate", small, "--prompt", "What is 1 and 2?"),
        ("run", recipe, f"model={small}", "steps=[{quantize: {group_size: 8}}]", *out),
        ("run", recipe, f"model={small}", "steps=[rotate]", *out, "--overwrite"),
        ("run", recipe, f"model={small}", "steps=[lora, {train: {max_steps: 1}}]", *out, "--overwrite"),
    ):
        message = refused(*arguments)
        for part in said:
            assert part in message


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.arange(32), r"windows of whole numbers\n  got:    torch.int64 \[32\]"),
        (torch.rand(2, 32), r"windows of whole numbers\n  got:    torch.float32 \[2, 32\]"),
        (torch.zeros(0, 32, dtype=torch.long), r"windows of whole numbers\n  got:    torch.int64 \[0, 32\]"),
        (torch.full((2, 32), 9999), r"not in the model's vocabulary\n  where:  tokens\n  got:    9999"),
    ],
)
def test_tokens_that_are_no_windows(model: Path, tokens: torch.Tensor, said: str) -> None:
    loaded, _ = slimtune.load(str(model))
    for function, options in (
        (slimtune.quantize, {"method": "optq", "group_size": 8, "calibration": tokens}),
        (slimtune.prune, {"calibration": tokens}),
        (slimtune.rotate, {"kind": "learned", "calibration": tokens}),
        (slimtune.add_lora, {"init": "lora-ga", "tokens": tokens}),
    ):
        with pytest.raises(SlimtuneError, match=said):
            function(loaded, **options)


def test_python_functions_refuse_what_is_no_recipe_and_no_dtype(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected keys and values"):
        slimtune.plan([1])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="expected keys and values"):
        slimtune.run(None, tmp_path / "out")  # type: ignore[arg-type]
    adapted = slimtune.add_lora(slimtune.load(str(model))[0], r=2)
    with pytest.raises(RecipeError, match=r"merge\.dtype(.|\n)*'int3'(.|\n)*bfloat16"):
        slimtune.merge(adapted, "int3")


def test_fewer_windows_than_were_asked_for_are_told(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(recipe), "data.calibration.samples=5000", "steps=[{quantize: {group_size: 8}}]"]
    assert _guarded(lambda: app([*arguments, "--output", str(tmp_path / "out")], standalone_mode=True)) == 0
    samples = json.loads((tmp_path / "out" / "report.json").read_text())["steps"][0]["facts"]["calibration"]["samples"]
    assert f"it has {samples} windows of 32 tokens, all used, not 5,000" in capsys.readouterr().err
