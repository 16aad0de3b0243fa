"""The folder of a run, opened: made, emptied, refused or continued; and what of its recipe may change on the way.

A run goes on with any recipe that asks for the same up to where it has come. What is done is not done again, so a step
that is done, or has kept a part of its work, stays as it is, and so does what every step depends on: the model, the
data, the seed and the dtype. Later steps are free.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from slimtune.errors import FormatError, RecipeError, SlimtuneError
from slimtune.files import write_json, write_text
from slimtune.lora.inits import INITS
from slimtune.recipe.document import parse, settle, write_recipe
from slimtune.recipe.gradients import sketch_file, wants_data, wants_residual
from slimtune.recipe.plan import resolve
from slimtune.recipe.schema import Evaluate, Lora, Quantize, Recipe, Train, recipe_from

RECIPE = "recipe.yaml"
PLACE = "began-in.json"  # under checkpoints/: the folder that the recipe's paths are relative to
LOG = "train_log.jsonl"

State = dict[str, Any]


def open_folder(recipe: Recipe, output: Path, *, resume: bool, overwrite: bool) -> tuple[State, str]:
    """The state of the run in `output`, which is made, emptied or gone on with; and the first of its steps that has
    changed since it began, if one has. Refuses what is not to be replaced."""
    path, place = output / "checkpoints" / "state.json", output / "checkpoints" / PLACE
    state: State = {"steps": [], "metrics": []}
    held, changed = _held(output), ""
    if held is not None and overwrite:
        _empty(recipe, output)
    elif held is not None:
        ours = _rewritten(write_recipe(recipe), Path())
        theirs = _theirs(held, place, ours)
        state = _read_state(path) if path.is_file() else state
        kept = _kept(output, len(state["steps"]))
        goes_on = theirs == ours if state.get("finished") else _common(theirs, ours) >= kept
        if theirs is None or not (resume and goes_on):
            raise _occupied(output, held, theirs, ours, kept, goes_on)
        _require_told(output, theirs, ours, kept)
        if theirs == ours and path.is_file():
            return state, ""
        changed = _forget(output, theirs, ours, kept) if theirs != ours else ""
    write_text(output / RECIPE, write_recipe(recipe))
    write_json(place, str(Path.cwd()))
    return state, changed


def _held(output: Path) -> str | None:
    """The recipe of the run that `output` holds, `None` where nothing would be lost."""
    if not output.is_dir():
        return None
    names = {path.name for path in output.iterdir()} - {f".{RECIPE}.partial"}
    if RECIPE in names:
        begun = names - {RECIPE, "checkpoints"} or {p.name for p in (output / "checkpoints").glob("*")} - {PLACE}
        return (output / RECIPE).read_text(encoding="utf-8", errors="replace") if begun else None
    if names:
        raise RecipeError(
            "the output folder is not empty and not a run", where=str(output), remedy="choose another --output"
        )
    return None


def _read_state(path: Path) -> State:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise FormatError("the run's state is damaged", where=str(path), remedy="--overwrite it") from error


def _rewritten(text: str, folder: Path) -> Recipe:
    """The recipe of a run, perhaps of an older version, as this one has it: with fields that have come since at their
    defaults, and whole paths to what lies in `folder`. Raises `RecipeError` where it is no recipe of this version."""
    settle(facts := parse(text), folder, whole=True)
    return resolve(recipe_from(facts))


def _theirs(held: str, place: Path, ours: Recipe) -> Recipe | None:
    """The recipe of a run as `ours` may be compared with: nothing depends on the name of either. `None` where it is no
    recipe of this version."""
    found = []
    for folder in (Path(json.loads(place.read_bytes()) if place.is_file() else ""), Path()):
        try:
            found.append(replace(_rewritten(held, folder), name=ours.name))
        except SlimtuneError:
            continue
    # The folder may have moved with all it reads: then its paths are relative to the current one.
    return max(found, key=lambda theirs: _common(theirs, ours), default=None)


def _common(theirs: Recipe | None, ours: Recipe) -> int:
    """How many steps two recipes begin with alike; -1 where they differ in what every step depends on."""
    if theirs is None or replace(theirs, steps=()) != replace(ours, steps=()):
        return -1
    pairs = zip(theirs.steps, ours.steps, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(theirs.steps), len(ours.steps)))


def _kept(output: Path, done: int) -> int:
    """How many steps are done, or have kept a part of their work: what a kill left half written is no such part."""
    root = output / "checkpoints"
    files = [path.relative_to(root) for path in root.glob(f"step-{done}-*/**/*") if path.is_file()]
    return done + any(not any(part.startswith(".") for part in path.parts) for path in files)


def _told(recipe: Recipe, number: int) -> str:
    """What step `number` made use of in the steps after it."""
    step, later = recipe.steps[number], recipe.steps[number + 1 :]
    if isinstance(step, Quantize):  # it keeps what it lost, for an adapter that starts there
        lora = next((s for s in later if isinstance(s, Lora)), None)
        if lora is not None and wants_residual(lora):
            return f"{lora.init if INITS[lora.init].start else 'init_residual'} of rank {lora.r}"
    if isinstance(step, Lora) and wants_data(step, sketch_file(step)):  # its batches are those of the training
        train = next((s for s in later if isinstance(s, Train)), Train())
        keys = ("per_device_train_batch_size", "max_length", "packing", "completion_only_loss")
        return ", ".join(f"{key}: {getattr(train, key)}" for key in keys)
    return ""


def _require_told(output: Path, theirs: Recipe, ours: Recipe, kept: int) -> None:
    """Raise `RecipeError` where a step that is done made use of later ones that are others now."""
    for number, step in enumerate(ours.steps[:kept]):
        got, wanted = _told(theirs, number), _told(ours, number)
        if wanted and got != wanted:
            raise RecipeError(
                "a step that is done made use of a later one, which has changed",
                where=f"{output}, steps[{number}].{step.name}",
                got=got or "nothing of it",
                wanted=wanted,
                remedy="choose another --output, or --overwrite it",
            )


def _forget(output: Path, theirs: Recipe, ours: Recipe, kept: int) -> str:
    """Remove what is left of steps that had not come to keep anything; returns the first one that has changed."""
    for place in (output / "checkpoints").glob("step-*-*"):
        if place.is_dir() and int(place.name.split("-")[1]) >= kept:
            shutil.rmtree(place)
    if (log := output / LOG).is_file():
        whole, _, _ = log.read_text(encoding="utf-8").rpartition("\n")  # what follows was cut short
        write_text(log, "".join(f"{line}\n" for line in whole.splitlines() if json.loads(line)["train"] < kept))
    number = _common(theirs, ours)
    return f"steps[{number}].{ours.steps[number].name}" if number < len(ours.steps) else f"the end after {number} steps"


def _occupied(output: Path, held: str, theirs: Recipe | None, ours: Recipe, kept: int, goes_on: bool) -> RecipeError:
    if theirs == ours:
        return RecipeError(
            "the output folder holds a run of this recipe",
            where=str(output),
            remedy="--resume continues it, --overwrite starts again",
        )
    texts = (held if theirs is None else write_recipe(theirs)).split("\n"), write_recipe(ours).split("\n")
    got, wanted = next((a, b) for a, b in zip_longest(*texts, fillvalue="") if a != b)
    number = _common(theirs, ours)
    done = f", steps[{number}].{ours.steps[number].name}" if 0 <= number < min(kept, len(ours.steps)) else ""
    return RecipeError(
        "the output folder holds another recipe's run",
        where=f"{output}{done}",
        got=f"{got.strip()!r} in {output / RECIPE}",
        wanted=repr(wanted.strip()),
        remedy=("--resume takes over what has changed in later steps, " if goes_on else "choose another --output, ")
        + "or --overwrite it",
    )


def _empty(recipe: Recipe, output: Path) -> None:
    """Remove a run, its `recipe.yaml` aside: by that a folder half removed is still known as a run."""
    texts = [text for step in recipe.steps if isinstance(step, Evaluate) for text in step.sources]
    sources = filter(None, (recipe.data.train, recipe.data.eval, recipe.data.calibration, *texts))
    sketches = [str(file) for step in recipe.steps if isinstance(step, Lora) and (file := sketch_file(step))]
    read = (recipe.model, *(source.path for source in sources if source.path), *filter(os.path.exists, sketches))
    for name in read:
        if Path(name).expanduser().resolve().is_relative_to(output.resolve()):
            raise RecipeError(
                "the recipe reads from the run it would overwrite",
                where=str(output),
                got=name,
                remedy="choose another --output",
            )
    for path in output.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECIPE:
            path.unlink()
