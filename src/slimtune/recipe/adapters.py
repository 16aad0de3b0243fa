"""Which model an adapter is for, and what is said of that beside it."""

from __future__ import annotations

from pathlib import Path

from slimtune.recipe.legality import after
from slimtune.recipe.schema import Recipe, Train

BELONGS = (
    "\nScales of the packed base were trained together with this adapter: it belongs to the model in `model/` of its"
    " run, and does less on any other.\n"
)
"""Beside an adapter whose base changed with it."""

OWN = (
    "\nThe run changed the base before this adapter was trained: it fits the model in `model/` of its run and no other"
    " (`import slimtune` before transformers loads that, where it is packed).\n"
)
"""Beside an adapter whose base is not the original model."""


def base_name(recipe: Recipe, done: int, run: Path | None, original: str) -> str:
    """What the base of an adapter is called after the first `done` steps: a folder of the run where they changed it."""
    return str((run / "model").resolve()) if run is not None and after(recipe.steps[:done]).own else original


def belongs(recipe: Recipe, done: int) -> str:
    """What the README of an adapter says where its base changed with it or before it, in the first `done` steps; empty
    elsewhere."""
    steps = recipe.steps[:done]
    trained = any(isinstance(step, Train) and step.scales for step in steps)
    return (OWN if after(steps).own else "") + (BELONGS if trained else "")
