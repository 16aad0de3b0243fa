"""What pruning left of a model, for people: a section of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from slimtune.recipe.page import Cell, Grid, Section, four_digits, label, number, words
from slimtune.recipe.plots import Series, loss_plot, place, width_plot


def pruned_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What a step cut away: a prune step's own facts, or those of the ramp that a train step was."""
    found: dict[str, Any] = facts if facts.get("axes") else facts.get("prune") or {}
    return found if found.get("axes") else {}


def widths_section(i: int, facts: dict[str, Any]) -> Section:
    """What every block has kept, drawn and counted by kind; what that changed; and the loss on the way."""
    shares: dict[str, list[tuple[int, float]]] = {}
    counts: dict[tuple[str, int, int], int] = {}
    for axis in facts["axes"]:
        at, kind = place(axis["name"]), axis["kind"]
        if at is not None and axis["units"] > 0:
            shares.setdefault(kind, []).append((at.block, axis["real"] / axis["units"]))
        key = (kind, axis["real"], axis["units"])
        counts[key] = counts.get(key, 0) + 1
    names = {"kv": "KV groups", "heads": "query heads", "ffn": "FFN channels", "layers": "layers"}
    rows = [
        [
            Cell(names.get(kind, kind)),
            Cell(number(kept)),
            Cell(number(units), bar=kept / max(units, 1)),
            Cell(number(n)),
        ]
        for (kind, kept, units), n in counts.items()
    ]
    before, after, share = (facts.get(key) for key in ("parameters_before", "parameters_after", "removed_ratio"))
    note = f"{number(before)} parameters before, {number(after)} after. " if before and after else ""
    note += f"{share:.1%} of those of the {facts.get('of')} are gone. " if share else ""
    if facts.get("padded"):
        note += "Narrower blocks are padded with zeros to the widest: what is drawn is what is not zero. "
    again = facts.get("requantized") or []
    if again:
        note += f"Rounded again: {', '.join(f['name'] for f in again[:3])}{' ...' if again[3:] else ''} "
        note += f"({again[0]['reason']})."
    grid = Grid(rows, ["kind", "kept", "of", "sub-layers"], numbers=True)
    figures = [width_plot(f"widths-{i}", shares), _schedule_plot(i, facts)]
    grids = [grid, *_costs(facts), *_times(facts, names), *_schedule(facts)]
    return Section(f"Widths after pruning (step {i + 1})", note.strip(), "".join(filter(None, figures)) or None, grids)


def _costs(facts: dict[str, Any]) -> Iterator[Grid]:
    """Speed and memory of the model before and after."""
    cost = facts.get("cost") or {}
    if cost:
        rows = [
            [Cell(label(name)), Cell(words(name, cost["before"][name])), Cell(words(name, value))]
            for name, value in cost["after"].items()
            if name in cost["before"]
        ]
        yield Grid(rows, ["measured", "before", "after"], numbers=True)


def _times(facts: dict[str, Any], names: dict[str, str]) -> Iterator[Grid]:
    """What a block takes at the widths that were timed, where scores were weighed against that."""
    rows = [
        [Cell(names.get(kind, kind)), Cell(number(units)), Cell(four_digits(time))]
        for kind, points in (facts.get("latency") or {}).items()
        for units, time in points
    ]
    if rows:
        yield Grid(rows, ["a block with so many", "kept", "microseconds"], numbers=True)


def _points(facts: dict[str, Any]) -> dict[int, float]:
    return {int(step): loss for step, loss in (facts.get("losses") or {}).items() if math.isfinite(loss)}


def _schedule(facts: dict[str, Any]) -> Iterator[Grid]:
    """How much was gone, and what it did to held-out rows, at moments of a ramp."""
    points, history = _points(facts), {int(step): share for step, share in (facts.get("history") or {}).items()}
    rows = [
        [
            Cell(number(step)),
            Cell(f"{history.get(step, 0.0):.1%}", bar=history.get(step, 0.0)),
            Cell(four_digits(loss)),
            Cell(four_digits(math.exp(min(loss, 700.0)))),
        ]
        for step, loss in points.items()
    ]
    if rows:
        yield Grid(rows, ["training step", "gone", "held-out loss", "perplexity"], numbers=True)


def _schedule_plot(i: int, facts: dict[str, Any]) -> str | None:
    points = _points(facts)
    if len(points) < 2:
        return None
    series = Series("held-out loss after each cut", list(points), list(points.values()), "points")
    return loss_plot(f"schedule-{i}", [series])
