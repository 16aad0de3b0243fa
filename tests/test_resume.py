"""Killed at any moment and resumed, a run ends as if nothing had happened: the same tensors, bit for bit.

Most ends are simulated: an exception that nothing catches is raised at the chosen moment. One run folder goes through
real processes that kill themselves, where nothing gets to clean up.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import slimtune.export
import slimtune.kernels.memory
import slimtune.quant.apply
import slimtune.recipe.blocks
import slimtune.recipe.gradients
import slimtune.recipe.run
import slimtune.recipe.steps
import slimtune.train.checkpoint
from pico import save_pico
from slimtune.errors import RecipeError
from slimtune.recipe.document import read_recipe
from slimtune.recipe.run import run
from slimtune.recipe.schema import Recipe
from slimtune.train.loop import _CountingTrainer

RECIPE = """\
model: {model}
data:
  train: {data}
  eval: {{path: {data}, samples: 3}}
  calibration: {{path: {data}, samples: 6, length: 32}}
steps:
  - quantize: {{bits: 3, group_size: 16}}
  - lora: {{r: 4, lora_dropout: 0.1, init: lora-ga, init_residual: true, init_tokens: 100}}
  - train: {{max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_length: 48,
            learning_rate: 1e-2, logging_steps: 3, save_steps: 2, eval_steps: 3}}
  - evaluate: {{perplexity: {{train: {data}}}, length: 32, max_tokens: 128}}
  - export: {{format: peft}}
"""
MERGING = """\
model: {other}
data: {{train: {data}, calibration: {{path: {data}, samples: 6, length: 32}}}}
steps:
  - lora: {{r: 4}}
  - train: {{max_steps: 2, per_device_train_batch_size: 2, max_length: 48, learning_rate: 1e-2}}
  - merge: {{dtype: bfloat16}}
  - evaluate: {{perplexity: {{train: {data}}}, length: 32, max_tokens: 128}}
  - quantize: {{bits: 4, group_size: 16}}
  - export: {{format: safetensors}}
"""
SKETCHING = """\
model: {model}
data: {{train: {data}}}
steps:
  - quantize: {{method: rtn, group_size: 16}}
  - lora: {{r: 2, init: lora-ga, init_sketch: g.safetensors}}
"""

RUN, STEPS = slimtune.recipe.run, slimtune.recipe.steps


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Without plots and garbage collection, which are most of the time of a run this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RUN, "write_html", lambda _: None)
        patch.setattr(slimtune.kernels.memory, "release", lambda: None)
        patch.setattr(slimtune.quant.apply, "release", lambda: None)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a recipe on one model and one data file."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a in range(5) for b in range(4)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, other = save_pico(folder / "base"), save_pico(folder / "other", "opt")

    def write(text: str) -> Path:
        path = folder / f"{abs(hash(text))}.yaml"
        path.write_text(text.format(model=model, other=other, data=data))
        return path

    return write


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on whether it was interrupted."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found.update({f"{name}:{key}": tensor for key, tensor in load_file(path).items()})
        elif path.is_file() and path.name not in ("report.json", "report.html", "train_log.jsonl", "state.json"):
            found[name] = path.read_text()
            if path.name == "adapter_config.json":  # PEFT writes a set
                found[name] = sorted(found[name].replace(",", "").split())
    timed = {"tokens_per_second", "seconds_left", "peak_rss_bytes"}
    if (folder / "train_log.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        found["log"] = [{k: v for k, v in line.items() if k not in timed} for line in lines]
    report = json.loads((folder / "report.json").read_text())
    facts = [{k: v for k, v in s["facts"].items() if "second" not in k} for s in report["steps"]]
    found["report"] = [report["metrics"], report["model"], facts]
    return found


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert sorted(got) == sorted(wanted)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


@pytest.fixture(scope="module")
def uninterrupted(written: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(read_recipe(written(RECIPE)), folder)
    wanted = outcome(folder)
    assert len([name for name in wanted if name.startswith(("model/", "adapter/"))]) > 20
    assert [line["step"] for line in wanted["log"]] == [0, 1, 2, 3, 3, 4, 6, 6]
    return wanted


@pytest.fixture(scope="module")
def merged(written: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("merged") / "run"
    run(read_recipe(written(MERGING)), folder)
    return outcome(folder)


def ending(
    module: Any, name: str, call: int, *, after: bool = False, only: Callable[..., bool] = lambda *_: True
) -> Any:
    """`module.name`, patched to end the run at its `call`-th call (of those that `only` is true of)."""
    real, calls = getattr(module, name), [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        mine = only(*args)
        calls[0] += mine
        if mine and calls[0] == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if mine and calls[0] == call and after:
            raise Killed
        return result

    return patched


def is_state(path: Path, *_: object) -> bool:
    return path.name == "state.json"


MOMENTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "writing the first block": (slimtune.recipe.blocks, "save_file", {"call": 1}),
    "after the first block": (slimtune.recipe.blocks.FolderStore, "save", {"call": 1, "after": True}),
    "all blocks done, the model not written": (RUN, "_keep", {"call": 1}),
    "quantized model written, state not": (RUN, "write_json", {"call": 1, "only": is_state}),
    "state written, model not published": (RUN, "_publish", {"call": 1}),
    "gradients taken, the adapter not made": (STEPS, "attach_adapter", {"call": 1}),
    "before the first checkpoint": (_CountingTrainer, "training_step", {"call": 2}),
    "writing the second checkpoint": (slimtune.train.checkpoint, "save_file", {"call": 2}),
    "in the middle of step 4": (_CountingTrainer, "training_step", {"call": 8}),
    "trained, the adapter not written": (RUN, "_keep", {"call": 3}),
    "trained adapter written, state not": (RUN, "write_json", {"call": 3, "only": is_state}),
    "trained, the adapter not published": (RUN, "_publish", {"call": 3}),
    "in the middle of evaluating": (STEPS, "perplexity", {"call": 1, "after": True}),
    "in the middle of exporting": (slimtune.export, "largest_difference", {"call": 1}),
    "after the last step": (RUN, "_publish", {"call": 5}),
    "before the run is called finished": (RUN, "write_json", {"call": 6, "only": is_state}),
    "tidying up": (RUN, "_tidy", {"call": 1}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_ends_early_is_resumed_bit_for_bit(
    moment: str,
    written: Callable[[str], Path],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, name, how = MOMENTS[moment]
    recipe = read_recipe(written(RECIPE))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, ending(module, name, **how))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), uninterrupted)
    assert not list((tmp_path / "run").rglob(".*"))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["began-in.json", "state.json"]


@pytest.mark.parametrize("moment", [("_publish", 3), ("_keep", 4), ("_keep", 5), ("_publish", 5), ("_publish", 6)])
def test_a_merged_model_is_resumed_as_it_was_and_without_its_old_adapter(
    moment: tuple[str, int],
    written: Callable[[str], Path],
    merged: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = read_recipe(written(MERGING))
    name, call = moment
    with monkeypatch.context() as patch:
        patch.setattr(RUN, name, ending(RUN, name, call))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "adapter").exists()
    assert_same(outcome(tmp_path / "run"), merged)


def test_the_last_line_of_a_log_may_be_cut_short(
    written: Callable[[str], Path], uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(written(RECIPE))
    with monkeypatch.context() as patch:
        patch.setattr(_CountingTrainer, "training_step", ending(_CountingTrainer, "training_step", 8))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run")
    with (tmp_path / "run" / "train_log.jsonl").open("a") as log:
        log.write('{"train": 2, "step": 3, "lo')
    run(recipe, tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), uninterrupted)


KILLING = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[1]))
import slimtune.export, slimtune.recipe.blocks, slimtune.train.checkpoint
from slimtune import cli
from slimtune.train.callbacks import StepLog

def half_written(real, call):
    calls = []
    def patched(tensors, path, **kwargs):
        calls.append(path)
        real(tensors, path, **kwargs)
        if len(calls) == call:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    return patched

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def interrupted(self, facts):
    if facts["step"] == 3:
        os.kill(os.getpid(), signal.SIGINT)
    write(self, facts)

moment = sys.argv[2]
if moment == "quantizing":
    slimtune.recipe.blocks.save_file = half_written(slimtune.recipe.blocks.save_file, 2)
elif moment == "training":
    slimtune.train.checkpoint.save_file = half_written(slimtune.train.checkpoint.save_file, 2)
elif moment == "interrupted":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make what they start in the background deaf to it
    write, StepLog.write = StepLog.write, interrupted
elif moment == "exporting":
    slimtune.export.largest_difference = killed
sys.argv = ["slimtune", "run", *sys.argv[3:]]
cli.main()
"""


def test_real_kills_and_an_interrupt_one_after_another(
    written: Callable[[str], Path], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    path, folder = written(RECIPE), tmp_path / "run"
    lasting: list[str] = []
    for moment in ("quantizing", "training", "interrupted", "exporting"):
        done = subprocess.run(
            [sys.executable, "-c", KILLING, str(torch.get_num_threads()), moment, str(path), "--output", str(folder),
             *lasting],
            env=os.environ, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if moment == "interrupted":
            assert done.returncode == 130, done.stderr
            assert done.stderr.count("slimtune: interrupted") == 1
            assert "--resume" in done.stderr and "Traceback" not in done.stderr
        else:
            assert done.returncode == -signal.SIGKILL, done.stderr
        lasting = ["--resume"]
    assert any(path.name.endswith(".partial") for path in folder.rglob("*"))  # a kill leaves its mess
    run(read_recipe(path), folder, resume=True)
    assert_same(outcome(folder), uninterrupted)


def test_gradients_are_not_taken_again(
    written: Callable[[str], Path], uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(written(RECIPE))
    with monkeypatch.context() as patch:
        patch.setattr(STEPS, "attach_adapter", ending(STEPS, "attach_adapter", 1))
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run")
    monkeypatch.setattr(slimtune.recipe.gradients, "sketch_targets", lambda *_, **__: pytest.fail("taken again"))
    run(recipe, tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), uninterrupted)


def ended(recipe: Recipe, folder: Path, moment: tuple[Any, str, dict[str, Any]]) -> None:
    """A run of `recipe` that ended at `moment`."""
    module, name, how = moment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, ending(module, name, **how))
        with pytest.raises(Killed):
            run(recipe, folder)


def changed(path: Path, *pairs: tuple[str, str]) -> Recipe:
    """The recipe in a file with some of its text replaced."""
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    other = path.with_name("changed") / path.name
    other.parent.mkdir(exist_ok=True)
    other.write_text(text)
    return read_recipe(other)


LATER: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "the step that failed, and one after it": (
        "in the middle of evaluating", [("max_tokens: 128", "max_tokens: 64"), ("format: peft", "format: safetensors")]
    ),
    "more of them": ("in the middle of evaluating", [("  - export", "  - export: {format: safetensors}\n  - export")]),
    "fewer of them": ("in the middle of evaluating", [("  - export: {format: peft}\n", "")]),
    "a training without checkpoint": ("before the first checkpoint", [("max_steps: 6", "max_steps: 4")]),
    "half a block alone": ("writing the first block", [("bits: 3", "bits: 4")]),
    "another kind of step": ("before the first checkpoint", [("  - train", "  - export: {format: peft}\n  - train")]),
}  # fmt: skip


@pytest.mark.parametrize("what", LATER)
def test_steps_that_are_not_begun_may_change(what: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    """What follows is what an uninterrupted run of the changed recipe makes."""
    moment, pairs = LATER[what]
    path, said = written(RECIPE), []
    ended(read_recipe(path), tmp_path / "run", MOMENTS[moment])
    recipe = changed(path, *pairs)
    with pytest.raises(RecipeError, match="--resume takes over"):
        run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True, say=said.append)
    assert len([line for line in said if "which is taken over" in line]) == 1
    run(recipe, tmp_path / "whole")
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    run(recipe, tmp_path / "run", resume=True)  # it is the run's own now


DONE: dict[str, tuple[str, tuple[str, str], str]] = {
    "a step that is done": ("in the middle of evaluating", ("bits: 3", "bits: 4"), "steps[0].quantize"),
    "a step with a checkpoint": ("in the middle of step 4", ("max_steps: 6", "max_steps: 7"), "steps[2].train"),
    "a step with a block": ("after the first block", ("bits: 3", "bits: 4"), "steps[0].quantize"),
    "the data": ("in the middle of evaluating", ("samples: 3", "samples: 4"), "run\n"),
    "all of a finished run": ("tidying up", ("{format: peft}", "{format: safetensors}"), "run\n"),
    "the training that gradients were taken for": (
        "before the first checkpoint", ("max_length: 48", "max_length: 32"), "steps[1].lora"),
    "the adapter that a residual was found for": ("gradients taken, the adapter not made", ("r: 4,", "r: 3,"), "lora"),
}  # fmt: skip


@pytest.mark.parametrize("what", DONE)
def test_what_is_done_may_not_change(what: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    moment, pair, where = DONE[what]
    path = written(RECIPE)
    ended(read_recipe(path), tmp_path / "run", MOMENTS[moment])
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(RecipeError, match=r"another recipe's run|made use of a later one") as error:
        run(changed(path, pair), tmp_path / "run", resume=True)
    assert where in str(error.value) and "--overwrite" in str(error.value)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    run(read_recipe(path), tmp_path / "run", resume=True)


def test_a_sketch_that_is_not_there_yet_is_no_other_in_another_folder(
    written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies beside the recipe, wherever the run begins and goes on."""
    path, other = tmp_path / "r.yaml", tmp_path / "other"
    path.write_text(written(SKETCHING).read_text())
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    ended(read_recipe(Path("r.yaml")), tmp_path / "run", (RUN, "_publish", {"call": 1}))
    monkeypatch.chdir(other)
    run(read_recipe(Path("../r.yaml")), tmp_path / "run", resume=True)
    assert (tmp_path / "g.safetensors").is_file() and not list(other.iterdir())
