"""Plots as inline SVG: strings to set into an HTML page.

Several SVGs share one page, so every id carries its plot's name; the page gives the fonts and the colour of axes and
text (`currentColor`), so a plot reads on a light and on a dark background. No namespace, script or link is left in.
The same data give the same bytes.

Example:
    >>> svg = loss_plot("demo", [Series("loss", (1, 2), (3.0, 2.5))])
    >>> svg.startswith("<svg"), "://" in svg
    (True, False)
"""

from __future__ import annotations

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own text colour until the SVG is written
COLOURS = ("#2f7fc1", "#e0772f", "#3a9a62", "#c9487b", "#8a63c9", "#a8862a", "#1b9aaa", "#d1495b")
MARKERS = "osD^vP*X"
WIDTH = 9.0  # inches; the page scales the plot to its column


class Series(NamedTuple):
    """One line of a loss plot: `values` over training `steps`, drawn as a line, a faint line or joined points."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    kind: Literal["line", "faint", "points"] = "line"


class Place(NamedTuple):
    """Where a layer stands, by its dotted name: `model.layers.3.mlp.up` is block 3 of `model.layers`, kind `up`."""

    stack: str
    block: int
    kind: str


def place(name: str) -> Place | None:
    """The place of the layer called `name`, or None where the name has no block number.

    >>> place("model.layers.3.mlp.up")
    Place(stack='model.layers', block=3, kind='up')
    >>> place("head") is None
    True
    """
    match = re.fullmatch(r"(?:(.*?)\.)?([0-9]{1,9})\.(?:.*\.)?([^.]+)", name)
    return match and Place(match[1] or "", int(match[2]), match[3])


def loss_plot(name: str, series: Sequence[Series], target: float | None = None) -> str:
    """Losses over training steps, with a dashed level at `target` if there is one. `name` must be unique on the page.

    A faint series has the colour of the series after it (a raw curve behind its smoothed one). The axis covers the
    series that are not faint and the middle 98 % of those that are, so one spike does not flatten the picture.
    """
    with _figure(WIDTH, 3.4) as figure:
        axes = _axes(figure, 1)[0]
        colour = 0
        for one in series:
            tint = COLOURS[colour % len(COLOURS)]
            if one.kind == "faint":
                axes.plot(one.steps, one.values, color=tint, alpha=0.45, linewidth=0.8, label=_printable(one.label))
                continue
            marker = "o" if one.kind == "points" or len(one.steps) == 1 else ""
            axes.plot(one.steps, one.values, color=tint, linewidth=2, marker=marker, label=_printable(one.label))
            colour += 1
        if target is not None:
            axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="final loss of the first run")
        axes.set_ylim(*_loss_limits(series, target))
        axes.set_xlabel("training step")
        axes.set_ylabel("loss (nats per token)")
        _legend(axes)
        return _svg(name, figure, "loss over training steps")


def layer_plot(
    name: str, values: Mapping[str, float], what: str, title: str, limits: tuple[float, float] | None = None
) -> str | None:
    """A positive number of each layer over its block, one series for each kind of layer, one panel for each stack.

    `values` maps dotted layer names to numbers; those without a block number or with a number that is not positive are
    left out, and None is returned where nothing remains. Where a block has several layers of a kind (experts) every one
    is a marker and the line joins their means. `what` labels the axis, which covers `limits` where they are given.
    `name` must be unique on the page.
    """
    from matplotlib.ticker import MaxNLocator

    stacks: dict[str, dict[str, dict[int, list[float]]]] = {}
    for layer, value in values.items():
        if (at := place(layer)) and 0 < value < float("inf"):
            kinds = stacks.setdefault(at.stack, {})
            kinds.setdefault(at.kind, defaultdict(list))[at.block].append(value)
    if not stacks:
        return None
    with _figure(WIDTH, 3.4 * len(stacks)) as figure:
        for axes, (stack, kinds) in zip(_axes(figure, len(stacks)), stacks.items(), strict=True):
            for i, (kind, blocks) in enumerate(kinds.items()):
                colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
                order = sorted(blocks)
                axes.plot(order, [sum(blocks[b]) / len(blocks[b]) for b in order], color=colour, linewidth=1.2)
                points = [(b, value) for b in order for value in blocks[b]]
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4.5, label=_printable(kind))
            axes.set_yscale("log")
            if limits is not None:
                axes.set_ylim(*limits)
            _plain_log_ticks(axes)
            axes.set_xlabel(_printable(f"block of {stack}" if stack else "block"))
            axes.set_ylabel(what)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _legend(axes)
        return _svg(name, figure, title)


def error_plot(name: str, errors: Mapping[str, float]) -> str | None:
    """Relative error of each layer over its block, as `layer_plot` draws it."""
    return layer_plot(name, errors, "relative squared error", "quantization error by block")


def magnitude_plot(name: str, before: Sequence[float], after: Sequence[float]) -> str:
    """Magnitudes of the channels of one activation, before (faint) and after something was done to it."""
    with _figure(WIDTH, 2.6) as figure:
        axes = _axes(figure, 1)[0]
        for values, label, alpha, colour in ((before, "before", 0.55, COLOURS[1]), (after, "after", 1.0, COLOURS[0])):
            axes.fill_between(range(len(values)), values, alpha=alpha, color=colour, linewidth=0, label=label)
        axes.set_yscale("log")
        _plain_log_ticks(axes)
        axes.set_xlabel("channel")
        axes.set_xticks([])
        axes.set_ylabel("largest magnitude")
        _legend(axes)
        return _svg(name, figure, "magnitudes of channels")


def width_plot(name: str, widths: Mapping[str, Sequence[tuple[int, float]]]) -> str | None:
    """How much of each kind every block has kept: `widths` maps a kind to (block, share of its units that is left).

    None where there is nothing to draw. `name` must be unique on the page.
    """
    from matplotlib.ticker import MaxNLocator

    if not any(widths.values()):
        return None
    with _figure(WIDTH, 2.8) as figure:
        axes = _axes(figure, 1)[0]
        room = 0.8 / len(widths)
        for i, (kind, points) in enumerate(widths.items()):
            places = [block + (i - (len(widths) - 1) / 2) * room for block, _ in points]
            shares = [100 * share for _, share in points]
            axes.bar(places, shares, width=room, color=COLOURS[i % len(COLOURS)], label=_printable(kind))
        axes.set_ylim(0, 100)
        axes.set_xlabel("block")
        axes.set_ylabel("kept, per cent")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(name, figure, "share of units kept by block")


def _loss_limits(series: Sequence[Series], target: float | None) -> tuple[float, float]:
    shown = [target] if target is not None else []
    for one in series:
        values = sorted(one.values)
        cut = len(values) // 100 if one.kind == "faint" else 0
        shown += values[cut : len(values) - cut]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _plain_log_ticks(axes: Axes) -> None:
    """Ticks of a log axis as plain numbers (0.02, not a power), few enough to read over one decade or several."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "slimtune",
        "text.parse_math": False,
        "font.size": 10,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
    }
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # reason: a user's own matplotlibrc must not change the page
        matplotlib.rcParams.update(style)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        yield Figure(figsize=(width, height), layout="constrained")


def _axes(figure: Figure, panels: int) -> list[Axes]:
    column: list[Axes] = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in column:
        axes.patch.set_visible(False)
        axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.7)
        axes.set_axisbelow(True)
    return column


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _printable(label: str) -> str:
    """`label` without control characters, which XML cannot hold, and not so long that the plot has no room."""
    label = "".join(c if c.isprintable() else "?" for c in label.lstrip("_"))
    return label if len(label) <= 40 else label[:39] + "…"


def _svg(name: str, figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element for an HTML page; ids become `name-...`, and namespaces and metadata go."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {k.rpartition("}")[2]: _in_page(name, k, v) for k, v in node.attrib.items()}
        node.tail = (node.tail or "").strip()
        for child in list(node):
            if child.tag.endswith(("}metadata", "}style")):
                node.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _in_page(name: str, key: str, value: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
