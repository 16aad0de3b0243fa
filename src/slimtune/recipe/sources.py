"""What a recipe reads, looked at before anything is done: files, rows and tasks."""

from __future__ import annotations

from pathlib import Path

from slimtune.calib.formats import normalise
from slimtune.calib.rows import FILES, DataSource, read_rows
from slimtune.errors import SlimtuneError
from slimtune.evaluate.tasks import require_tasks
from slimtune.recipe.schema import Evaluate, Recipe

READ = 2**23
"""Bytes of a training file whose rows are all looked at (a second): a larger one, or one that is compressed, is known
when it is trained on."""

PLAIN = (".json", ".jsonl", ".csv", ".txt")


def check_sources(recipe: Recipe) -> None:
    """Raise `CalibrationError` for a local file that is not there or whose rows are in no form that is known, and
    `RecipeError` for a task that is not: now, and not hours into the run."""
    data = recipe.data
    texts = [text for step in recipe.steps if isinstance(step, Evaluate) for text in step.sources]
    for source in filter(None, (data.train, data.eval, data.calibration, *texts)):
        kind = Path(source.path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
        hub = source.path.count("/") == 1 and kind not in FILES
        if source.path and not hub and not Path(source.path).expanduser().exists():
            read_rows(source)  # its error says what is there instead
    for source in filter(None, (data.train, data.eval)):
        if _short(source):
            normalise(read_rows(source)[: source.samples], where=str(source))
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Evaluate) and step.tasks:
            try:
                require_tasks(step.tasks)
            except SlimtuneError as error:
                raise error.within(f"steps[{number}].evaluate") from error


def _short(source: DataSource) -> bool:
    path = Path(source.path).expanduser()
    return bool(source.path) and path.suffix in PLAIN and path.is_file() and path.stat().st_size <= READ
