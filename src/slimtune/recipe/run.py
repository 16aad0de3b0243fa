"""Running a recipe into a run folder, so that it can be killed at any moment and continued.

After each step the changed part of the model is written under `checkpoints/`, then `checkpoints/state.json` says that
the step is done, then the part moves to its public place. Whatever is half done when a run dies is done again.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import transformers
from peft import PeftModel

from slimtune import __version__
from slimtune.arch.weights import Checkpoint
from slimtune.errors import RecipeError
from slimtune.export.load import load, locate
from slimtune.export.native import write_model
from slimtune.files import whole_folder, write_json
from slimtune.kernels import compiled
from slimtune.kernels.memory import PeakMemory
from slimtune.lora.attach import base_of, has_adapter, load_adapter, save_adapter
from slimtune.recipe.adapters import base_name, belongs
from slimtune.recipe.folder import open_folder
from slimtune.recipe.legality import after, dtype_after
from slimtune.recipe.plan import Plan, plan
from slimtune.recipe.pruning import RECORD, pending, read_record
from slimtune.recipe.report import read_report, write_html
from slimtune.recipe.schema import Lora, Merge, Prune, Quantize, Recipe, Rotate, Step, Train, to_dict
from slimtune.recipe.steps import Session, run_step, size_of

Say = Callable[[str], None]


def run(
    recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False, say: Say = lambda _: None
) -> dict[str, Any]:
    """Run `recipe` into the folder `output`; returns the report (`report.json`).

    With `resume`, the run in the folder goes on, also with a recipe that has changed in steps that are not begun.
    Raises `RecipeError` when the folder holds another recipe's run, or this one's and neither `resume` nor `overwrite`
    is given; nothing in it is touched then.
    """
    if resume and overwrite:
        raise RecipeError("a run cannot be both continued and replaced", got="resume, overwrite", wanted="one of them")
    planned = plan(recipe)
    recipe = planned.recipe
    if not resume:
        Checkpoint(locate(recipe.model)[0])  # damaged weights are found before anything in `output` is replaced
    state, changed = open_folder(recipe, output, resume=resume, overwrite=overwrite)
    if changed:
        say(f"the recipe has changed from {changed} on, which is taken over")
    for warning in planned.warnings:
        say(f"warning: {warning}")
    if state.get("finished"):
        say("every step of this run is done")
        _tidy(output)
        return read_report(output) if (output / "report.json").is_file() else _write_report(planned, output, state)
    say(f"model {recipe.model}")
    session = _session(recipe, output, state, say, resume=resume)
    memory = PeakMemory()
    for number in range(len(state["steps"]), len(recipe.steps)):
        step = recipe.steps[number]
        say(f"[{number + 1}/{len(recipe.steps)}] {step.name}")
        memory.restart()
        start = time.perf_counter()
        facts = run_step(session, step, number)
        fact: dict[str, Any] = {
            "step": step.name,
            "seconds": time.perf_counter() - start,
            "peak_rss_bytes": memory.resident,
            "peak_device_bytes": memory.device,
            "facts": facts,
        }
        say(f"  done in {fact['seconds']:.1f} s, peak memory {fact['peak_rss_bytes'] / 1e9:.2f} GB")
        _keep(session, step, number, output)
        state["steps"].append(fact)
        state["metrics"] = session.metrics
        state["model"] = size_of(session.model).to_dict()
        write_json(output / "checkpoints" / "state.json", state)
        _publish(recipe, output, number)
        if _streams(step):  # the files that its weights are still read from have moved
            session = _session(recipe, output, state, say, resume=False)
        session.resume = False
        _write_report(planned, output, state)
    if not (output / "model" / "config.json").is_file():
        _write_base(session, output / "model")
    report = _write_report(planned, output, state)
    write_json(output / "checkpoints" / "state.json", {**state, "finished": True})
    _tidy(output)
    say(f"report: {output / 'report.html'}")
    return report


def _session(recipe: Recipe, output: Path, state: dict[str, Any], say: Say, *, resume: bool) -> Session:
    """The model as the last finished step left it."""
    done = list(enumerate(recipe.steps[: len(state["steps"])]))
    dense = [n for n, step in done if _changes_base(step, recipe, n)]
    adapted = [n for n, step in done if isinstance(step, Lora | Train | Prune)]
    merged = max((n for n, step in done if isinstance(step, Merge)), default=-1)
    if done:
        _publish(recipe, output, len(done) - 1)  # those before it were published before it began
    first = next(iter(recipe.steps[len(done) :]), None)
    loaded = load(
        str(output / "model") if dense else recipe.model,
        dtype=dtype_after(recipe, len(done)),
        lazy=isinstance(first, Quantize) or _streams(first),
    )
    if dense:
        loaded = replace(loaded, name=state["name"])
    state["name"] = loaded.name
    model: torch.nn.Module = loaded.model
    adapters = [n for n in adapted if n > merged and (output / "checkpoints" / f"step-{n}-adapter").is_dir()]
    if adapters:
        model = load_adapter(model, output / "checkpoints" / f"step-{max(adapters)}-adapter", trainable=True)
    pruning = read_record(output / "model" if dense else locate(recipe.model)[0])
    metrics = list(state["metrics"])
    return Session(recipe, loaded, model, say, folder=output, resume=resume, metrics=metrics, pruning=pruning)


def _streams(step: Step | None) -> bool:
    """Whether a step goes from file to file: its model is never whole in memory."""
    return isinstance(step, Rotate) and step.stream


def _changes_base(step: Step, recipe: Recipe, number: int) -> bool:
    """Whether a step changes weights other than an adapter's."""
    if isinstance(step, Prune):
        return not step.ramped
    if not isinstance(step, Train):
        return isinstance(step, Rotate | Quantize | Merge)
    return step.scales or pending(recipe.steps, number) is not None or not after(recipe.steps[:number]).adapter


def _keep(session: Session, step: Step, number: int, output: Path) -> None:
    """Write what a step changed under `checkpoints/`."""
    changed = _changes_base(step, session.recipe, number)
    if changed and not _streams(step):  # such a step has written its model
        _write_base(session, output / "checkpoints" / f"step-{number}-model")
    if has_adapter(session.model) and (changed or isinstance(step, Lora | Train)):
        with whole_folder(output / "checkpoints" / f"step-{number}-adapter") as partial:
            name = base_name(session.recipe, number + 1, output, session.loaded.name)
            save_adapter(cast(PeftModel, session.model), partial, name)
            if note := belongs(session.recipe, number + 1):
                (partial / "README.md").write_text(note, encoding="utf-8")


def _publish(recipe: Recipe, output: Path, number: int) -> None:
    """Move what a finished step changed to where a user looks for it. May be done again when it was cut short."""
    model = output / "checkpoints" / f"step-{number}-model"
    if model.is_dir():
        shutil.rmtree(output / "model", ignore_errors=True)
        model.rename(output / "model")
    if _changes_base(recipe.steps[number], recipe, number):
        shutil.rmtree(output / "adapter", ignore_errors=True)  # of the model before this one
    adapter = output / "checkpoints" / f"step-{number}-adapter"
    if adapter.is_dir():
        with whole_folder(output / "adapter") as partial:
            shutil.copytree(adapter, partial, dirs_exist_ok=True)


def _write_base(session: Session, folder: Path) -> None:
    """Write the model without its adapter as a Hugging Face folder."""
    session.whole()
    with whole_folder(folder) as partial:
        write_model(cast(transformers.PreTrainedModel, base_of(session.model)), session.loaded.tokenizer, partial)
        if session.pruning is not None:
            write_json(partial / RECORD, session.pruning)


def _tidy(output: Path) -> None:
    """Remove what only a resumption of this run would have needed; `state.json` stays and says that it is finished."""
    for path in (output / "checkpoints").iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _write_report(planned: Plan, output: Path, state: dict[str, Any]) -> dict[str, Any]:
    report = {
        "slimtune": __version__,
        "recipe": to_dict(planned.recipe),
        "environment": environment(),
        "steps": state["steps"],
        "metrics": state["metrics"],
        "model": state.get("model", {}),
        "plan": {"steps": planned.to_dict()["steps"]},
    }
    write_json(output / "report.json", report)
    write_html(output)
    return read_report(output)


def environment() -> dict[str, Any]:
    """The machine and the versions that results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "c_loops": compiled.library() is not None,
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
