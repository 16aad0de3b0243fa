"""An HTML page as a title, a summary and a list of sections, and numbers written for people.

A section is a plot, tables and text, each if it is there; one template draws every page. The page is one file: its
styles and plots are inline, and its content policy forbids loading anything.

Example:
    >>> duration(205), size(180_100_000), number(28.7149)
    ('3 min 25 s', '180.1 MB', '28.71')
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from slimtune.files import write_text


def number(value: float) -> str:
    """Four significant digits; whole numbers in full, with thousands separators."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def four_digits(value: float) -> str:
    """Four significant digits, trailing zeros kept: measurements that are read against each other."""
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1000 else number(value)


def size(value: float) -> str:
    """Bytes in decimal units: kB, MB, GB."""
    if not math.isfinite(value):
        return str(value)
    for power, name, digits in ((4, "TB", 2), (3, "GB", 2), (2, "MB", 1), (1, "kB", 1)):
        if abs(value) >= 1000**power:
            return f"{value / 1000**power:,.{digits}f} {name}"
    return f"{value:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    if not 60 <= seconds < 1e9:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Unit(NamedTuple):
    """How numbers under a name are written, and which direction is better: -1 lower, 1 higher, 0 neither."""

    write: Callable[[float], str]
    better: int


# By the end of the name; the first that fits.
_UNITS = {
    "bytes": Unit(size, -1),
    "per_second": Unit(number, 1),
    "seconds": Unit(duration, -1),
    "perplexity": Unit(four_digits, -1),
    "bits_per_weight": Unit(number, -1),
    "loss": Unit(four_digits, -1),
    "steps_to_target": Unit(number, -1),
    "acc": Unit(four_digits, 1),
    "acc_norm": Unit(four_digits, 1),
    "": Unit(number, 0),
}


def unit(name: str) -> Unit:
    """The unit of the metric or fact called `name`, by the end of its name."""
    return next(unit for end, unit in _UNITS.items() if name.endswith(end))


_LABELS = {
    "bytes": "model size",
    "seconds": "time",
    "peak_rss_bytes": "peak memory",
    "peak_device_bytes": "peak device memory",
    "steps_to_target": "steps to the first run's final loss",
}


def label(name: str) -> str:
    """A metric's or fact's name as words: `decode_tokens_per_second` -> `decode tokens per second`."""
    return _LABELS.get(name, name.removesuffix("_bytes").replace("_", " "))


def words(name: str, value: Any) -> str:
    """Any JSON value under `name` as text: numbers in their unit, nothing as a dash, long lists cut."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return unit(name).write(value)
    if value in ([], {}):
        return "none"
    if isinstance(value, list):
        shown = [words(name, item) if not isinstance(item, (list, dict)) else json.dumps(item) for item in value[:12]]
        return ", ".join(shown) + (f", and {len(value) - 12:,} more" if len(value) > 12 else "")
    return str(value)


class Cell(NamedTuple):
    """One cell of a table: its text, a line under it that may be good or bad news, and the length (0 to 1) of a bar."""

    text: str
    small: str = ""
    tone: str = ""
    bar: float | None = None


class Grid(NamedTuple):
    """A table; the first cell of a row names it. Cells that are numbers stand to the right."""

    rows: list[list[Cell]]
    head: Sequence[str] = ()
    caption: str = ""
    numbers: bool = False


class Section(NamedTuple):
    """A part of a page: a note, a plot (SVG), tables and preformatted text, each if it is there."""

    title: str
    note: str = ""
    figure: str | None = None
    grids: Sequence[Grid] = ()
    text: str = ""


class Page(NamedTuple):
    """A whole page: what stands on top, `tiles` of (label, value, small print), sections, the version that wrote it."""

    title: str
    subtitle: str
    summary: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    version: str


def write_page(path: Path, page: Page) -> Path:
    """Write `page` as one HTML file, whole or not at all; all text is escaped, and empty sections are left out."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("slimtune.recipe").joinpath("report.html.jinja").read_text("utf-8"))
    shown = [section for section in page.sections if section.figure or section.grids or section.text]
    write_text(path, template.render(page._replace(sections=shown)._asdict()))
    return path


def versus_first(name: str, values: Sequence[float | None]) -> list[Cell]:
    """A cell for each value of the metric called `name`, with its change against the first one that is known.

    >>> [(cell.text, cell.small) for cell in versus_first("wiki_perplexity", [20.0, None, 25.0])]
    [('20.00', ''), ('-', ''), ('25.00', '+25.0 %')]
    """
    first = next((value for value in values if value is not None), None)
    return [_versus(name, value, first) if i else Cell(words(name, value)) for i, value in enumerate(values)]


def _versus(name: str, value: float | None, first: float | None) -> Cell:
    if value is None or not first or not math.isfinite(value - first):
        return Cell(words(name, value))
    change = 100 * (value - first) / abs(first)
    if abs(change) < 0.05:
        return Cell(words(name, value))
    gain = unit(name).better * change
    return Cell(words(name, value), f"{change:+,.1f} %", "good" if gain > 0 else "bad" if gain < 0 else "")
