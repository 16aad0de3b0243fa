"""How an adapter started, for people: a section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimtune.recipe.page import Cell, Grid, Section, four_digits, number, words
from slimtune.recipe.plots import layer_plot, place

_COLUMNS = {
    "energy": "captured",
    "overlap": "overlap of halves",
    "gradient_norm": "norm of the gradient",
    "ratio": "size beside the weight",
    "rank": "rank",
}

_DRAWN = {
    "energy": ("share that is captured", "captured by block"),
    "overlap": ("overlap of two halves of the data", "overlap by block"),
    "ratio": ("size beside the weight", "size of the start by block"),
}
"""What is drawn of every layer: the label of the axis, and the title."""

_SEEN = {
    "gradient": ("Gradients", "gradient"),
    "inputs": ("Inputs", "covariance of the inputs"),
    "outputs": ("Inputs and outputs", "product of the weight and the second moment of its inputs"),
}


def starts_section(i: int, facts: dict[str, Any]) -> Section:
    """What the `lora` step `i` reports of its layers, by their kind: means, and least to greatest below them."""
    layers: list[dict[str, Any]] = facts.get("layers") or []
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        at = place(layer["name"])
        kinds.setdefault(at.kind if at else layer["name"], []).append(layer)
    shown = [key for key in _COLUMNS if any(layer.get(key) is not None for layer in layers)]
    rows = [
        [Cell(kind), *(_spread([layer.get(key) for layer in found]) for key in shown)] for kind, found in kinds.items()
    ]
    notes: dict[str, list[str]] = {}
    for layer in layers:
        if layer.get("note"):
            notes.setdefault(layer["note"], []).append(layer["name"])
    remarks = [[Cell(note, f"{len(names):,} layers"), Cell(words("", names))] for note, names in notes.items()]
    drawn = {key: {la["name"]: la[key] for la in layers if la.get(key) is not None} for key in _DRAWN}
    figures = [layer_plot(f"{key}-{i}", drawn[key], *words_of) for key, words_of in _DRAWN.items()]
    grids = [Grid(rows, ["layers", *(_COLUMNS[key] for key in shown)], numbers=True)] if rows else []
    grids += [Grid(remarks, ["note", "layers"])] if remarks else []
    return Section(
        f"Where the adapter starts (step {i + 1})",
        _note(facts, bool(drawn["overlap"])),
        "".join(filter(None, figures)) or None,
        grids,
    )


def cut_section(i: int, facts: dict[str, Any]) -> Section:
    """What the `export` step `i` lost of each layer's update when it cut the adapter to a lower rank."""
    errors = {layer["name"]: layer["error"] for layer in facts["cut"]}
    worst = sorted(errors.items(), key=lambda pair: -pair[1])[:5]
    rows = [[Cell(name), Cell(four_digits(error))] for name, error in worst]
    note = (
        f"Cut to rank {number(facts['rank'])}: {four_digits(facts['error'])} of the whole update is lost (the norm"
        " of what is missing beside that of the update). Below, the layers that lost most."
    )
    figure = layer_plot(f"cut-{i}", errors, "share of the update that is lost", "loss by block")
    return Section(f"The adapter, cut (step {i + 1})", note, figure, [Grid(rows, ["layer", "lost"], numbers=True)])


def _note(facts: dict[str, Any], drawn: bool) -> str:
    seen = facts.get("gradients")
    if not seen:
        return "The size beside the weight is that of the start, which is subtracted again where it is not zero."
    of = str(seen.get("of", "gradient"))
    note = f"{_SEEN[of][0]} of {number(seen['tokens'])} learnt tokens"
    note += ", after which the overlap was stable" if seen.get("stable") else ""
    note += ". Captured is the part of the squared " + _SEEN[of][1] + " in the directions the init was given"
    if drawn:
        note += "; the overlap (0 to 1) is what the leading input directions of two halves of the data have in common"
    if search := facts.get("search"):
        note += f". Of {search['tried']} sizes tried, {search['size']:g} of the paper's step was the best: on those"
        note += f" batches it took the loss from {four_digits(search['before'])} to {four_digits(search['after'])}"
    return note + "."


def _spread(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell("-")
    least, greatest = min(known), max(known)
    below = "" if least == greatest else f"{four_digits(least)} to {four_digits(greatest)}"
    return Cell(four_digits(sum(known) / len(known)), below)
