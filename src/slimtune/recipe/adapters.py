"""Which model an adapter is for, and what is said of that beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from slimtune.arch import ModelMap, Port
from slimtune.lora.attach import resolve_targets
from slimtune.recipe.legality import after
from slimtune.recipe.schema import Lora, Recipe, Train

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


def ports_of(step: Lora, model: nn.Module, modelmap: ModelMap) -> list[Port]:
    """The linears that get an adapter."""
    targets = resolve_targets(modelmap, model, step.target_modules)
    linears = [port for port in modelmap.ports if port.kind == "linear"]
    return [p for p in linears if any(p.name == target or p.name.endswith(f".{target}") for target in targets)]


def excess_rank(r: int, ports: Sequence[Port], where: str) -> list[str]:
    """A warning where `r` is above what updates of the linears `ports` can have, the smaller of their two widths."""
    width, name = min(((min(p.in_features, p.out_features), p.name) for p in ports), default=(r, ""))
    if r <= width:
        return []
    return [f"{where}: rank {r:,} is above the smaller width of {name}, {width:,}: beyond that it adds numbers alone"]


def base_name(recipe: Recipe, done: int, run: Path | None, original: str) -> str:
    """What the base of an adapter is called after the first `done` steps: a folder of the run where they changed it."""
    return str((run / "model").resolve()) if run is not None and after(recipe.steps[:done]).own else original


def belongs(recipe: Recipe, done: int) -> str:
    """What the README of an adapter says where its base changed with it or before it, in the first `done` steps; empty
    elsewhere."""
    steps = recipe.steps[:done]
    trained = any(isinstance(step, Train) and step.scales for step in steps)
    return (OWN if after(steps).own else "") + (BELONGS if trained else "")
