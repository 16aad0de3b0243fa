"""What a run did, for people: `report.html` from its folder, and several runs compared.

Nothing is measured here: every number comes from the run folder, and what a run did not record is left out.
`compare` gives a table of the last value of each metric, the costs, and the first training step at which
a run's smoothed loss reaches the final smoothed loss of the first run.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table as Grille
from rich.text import Text

from slimtune.recipe.page import Cell, Grid, Page, Section, four_digits, label, number, versus_first, words, write_page
from slimtune.recipe.plots import Series, error_plot, layer_plot, loss_plot, magnitude_plot, place
from slimtune.recipe.record import Curve, Metric, Report, metrics, read_curves, read_report, report_path
from slimtune.recipe.starts import cut_section, starts_section
from slimtune.recipe.widths import pruned_facts, widths_section

__all__ = ["Comparison", "compare", "print_comparison", "read_report", "write_comparison_html", "write_html"]

_DRAWN_ELSEWHERE = (
    "layers",
    "skipped",
    "sample",
    "axes",
    "requantized",
    "lost",
    "prune",
    "channels",
    "ranks",
    "cost",
    "latency",
    "cut",
)

# How the summary says what a step did: the verb, then what follows it for each setting or fact that is known.
_DEEDS: dict[str, tuple[str, dict[str, str]]] = {
    "rotate": ("rotated", {"kind": " ({})"}),
    "prune": ("pruned", {"ratio": " at ratio {}", "importance": " by {} importance"}),
    "quantize": ("quantized", {"bits": " to {} bits", "method": " with {}", "group_size": " in groups of {}"}),
    "lora": ("given LoRA adapters", {"r": " of rank {}", "init": " ({} init)"}),
    "train": ("fine-tuned", {"steps": " for {} steps"}),
    "merge": ("merged", {}),
    "export": ("exported", {"format": " as {}"}),
}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects, and of lists of objects, under dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}[{i}]")
    else:
        yield name, value


def write_html(run: Path) -> Path:
    """Write `report.html` beside the `report.json` of `run`, a run folder or the file itself, and return its path.

    One self-contained file that loads nothing; the same run gives the same bytes. Raises `FormatError`.
    """
    report, curves = read_report(run), read_curves(run)
    path = report_path(run.resolve()).with_name("report.html")
    named = [(step["step"], step["facts"], i) for i, step in enumerate(report["steps"])]
    sections = [
        _measured(report),
        *(starts_section(i, facts) for step, facts, i in named if step == "lora"),
        *(cut_section(i, facts) for step, facts, i in named if step == "export" and facts.get("cut")),
        *(_training(i, facts, curves.get(i, curves.get(None))) for step, facts, i in named if step == "train"),
        *(_rotation(i, facts) for step, facts, i in named if step == "rotate"),
        *(widths_section(i, pruned) for _, facts, i in named if (pruned := pruned_facts(facts))),
        *(_quantization(i, facts) for step, facts, i in named if step == "quantize"),
        _costs(report),
        *(_skipped(i, facts) for step, facts, i in named if step == "quantize"),
        _facts(report),
        Section("Environment", grids=[_pairs(_flat(report["environment"]))] if report["environment"] else []),
        Section("Recipe", "As resolved, with every default.", text=_yaml(report["recipe"])),
    ]
    title, model = report["recipe"].get("name") or path.parent.name, report["recipe"].get("model") or "a model"
    return write_page(path, Page(title, model, _summary(report), _tiles(report), sections, report["slimtune"]))


def _moments(report: Report) -> dict[int, str]:
    """What to call the moments of measurement: after the last step that changed the model, or the start."""
    moments = {}
    for i in sorted({metric["after_step"] for metric in report["metrics"]}):
        before = [s["step"] for s in report["steps"][: i + 1] if s["step"] not in ("evaluate", "export")]
        moments[i] = f"after {before[-1]}" if before else "start"
    shared = Counter(moments.values())
    return {i: f"{name} (step {i + 1})" if shared[name] > 1 else name for i, name in moments.items()}


def _summary(report: Report) -> str:
    """One sentence: what was done to the model, then its size and perplexities each time they changed."""
    deeds = []
    for i, step in enumerate(report["steps"]):
        if step["step"] == "evaluate":
            continue
        verb, details = _DEEDS.get(step["step"], (f"given the step {step['step']}", {}))
        known = _settings(report, i) | step["facts"]
        said = ((form, known.get(key)) for key, form in details.items())
        deeds.append(verb + "".join(form.format(words("", v)) for form, v in said if v not in (None, -1)))
    listed = ", ".join(deeds[:-1]) + (" and " if deeds[1:] else "") + "".join(deeds[-1:])
    moments, measured = _moments(report), []
    for metric, values in metrics(report).items():
        if metric.name.endswith("perplexity") or metric.name in ("bytes", "bits_per_weight"):
            told = [(words(metric.name, value), _moment(moments[i])) for i, value in values.items()]
            changes = [f"{value} {next(same)[1]}" for value, same in groupby(told, key=itemgetter(0))]
            measured.append(f"{label(metric.name)} {', '.join(changes)}")
    sentence = f"{report['recipe'].get('model') or 'The model'} was {listed or 'left as it is'}"
    return ": ".join(filter(None, (sentence, "; ".join(measured)))) + "."


def _moment(name: str) -> str:
    return "at the start" if name == "start" else name


def _settings(report: Report, i: int) -> dict[str, Any]:
    """The recipe's own fields of step `i`."""
    steps = report["recipe"].get("steps") or []
    fields = steps[i].get(report["steps"][i]["step"]) if i < len(steps) else None
    return fields if isinstance(fields, dict) else {}


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    moments, model, tiles = _moments(report), report["model"], []
    series = {metric.name: list(values.items()) for metric, values in metrics(report).items()}
    series.setdefault("bytes", [(-1, model.get("bytes"))])
    series.setdefault("bits_per_weight", [(-1, model.get("bits_per_weight"))])
    perplexities = [name for name in series if name.endswith("perplexity")][:1]
    for name in ("bytes", "bits_per_weight", *perplexities):
        (first, before), (_, after) = series[name][0], series[name][-1]
        if after is not None:
            was = f"from {words(name, before)} {_moment(moments.get(first, ''))}" if before != after else ""
            tiles.append((label(name), words(name, after), was))
    steps = report["steps"]
    slowest = max(steps, key=lambda step: float(step["seconds"]), default=None)
    if slowest:
        share = f"{words('seconds', slowest['seconds'])} of it {slowest['step']}"
        tiles.append(("time", words("seconds", sum(step["seconds"] for step in steps)), share))
    for key, name in (("peak_rss_bytes", "peak memory"), ("peak_device_bytes", "peak device memory")):
        known = [step for step in steps if step.get(key) is not None]
        if known:
            highest = max(known, key=lambda step: float(step[key]))
            tiles.append((name, words("bytes", highest[key]), f"during {highest['step']}"))
    return tiles


# Sections of a report


def _measured(report: Report) -> Section:
    moments, rows = _moments(report), []
    for metric, values in metrics(report).items():
        tokens = f"{number(metric.tokens)} tokens" if metric.tokens else ""
        windows = f"windows of {number(metric.length)}" if metric.length else ""
        samples = f"{number(metric.samples)} samples" if metric.samples else ""
        name = Cell(label(metric.name), ", ".join(filter(None, (tokens, windows, samples))))
        rows.append([name, *versus_first(metric.name, [values.get(i) for i in moments])])
    note = "Changes are against the first measurement."
    return Section("Before and after", note, grids=[Grid(rows, ["", *moments.values()], numbers=True)] if rows else [])


def _training(i: int, facts: dict[str, Any], curve: Curve | None) -> Section:
    figure, note = None, ""
    if curve:
        smooth, held_out = curve.smoothed(curve.span), curve.evaluations
        series = [
            Series("training loss", list(curve.losses), list(curve.losses.values()), "faint"),
            Series("training loss, smoothed", list(smooth), list(smooth.values())),
            *([Series("evaluation loss", list(held_out), list(held_out.values()), "points")] if held_out else []),
        ]
        figure = loss_plot(f"loss-{i}", series)
        note = f"The smoothed loss is a running mean over about {number(curve.span)} training steps. "
    note += (
        "Below: a training sample as the model sees it; what « » enclose is not learnt." if facts.get("sample") else ""
    )
    return Section(f"Training (step {i + 1})", note.strip(), figure, text=facts.get("sample") or "")


def _rotation(i: int, facts: dict[str, Any]) -> Section:
    """What a rotation did to the inputs of linears: their kurtosis by block, and the channels of the worst of them."""
    layers, channels = facts.get("layers") or [], facts.get("channels")
    plots, shown = [], {}
    for when in ("before", "after"):
        shown[when] = {layer["name"]: float(layer[f"kurtosis_{when}"]) for layer in layers}
    positive = [value for values in shown.values() for value in values.values() if 0 < value < math.inf]
    limits = (0.8 * min(positive), 1.25 * max(positive)) if positive else None
    for when, values in shown.items():
        title = f"kurtosis of linear inputs {when} the rotation"
        plots.append(layer_plot(f"kurtosis-{when}-{i}", values, f"kurtosis {when}", title, limits) or "")
    note = (
        "Kurtosis of the channels of a token, averaged over tokens, of the input of each linear: 3 for a Gaussian, and "
        "the higher the more a few channels stand out. First before the rotation, then after it"
    )
    if channels:
        plots.append(magnitude_plot(f"channels-{i}", channels["before"], channels["after"]))
        note += f"; below, the largest magnitude of each channel of the input of {channels['name']}"
    worst = sorted(layers, key=lambda layer: -float(layer["kurtosis_after"]))[:5]
    keys = ("kurtosis_before", "kurtosis_after", "peak_before", "peak_after")
    rows = [[Cell(layer["name"]), *(Cell(words(key, layer.get(key))) for key in keys)] for layer in worst]
    head = ["highest kurtosis after", "before", "after", "largest channel / median before", "after"]
    grids = [Grid(rows, head, numbers=True)] if rows else []
    return Section(f"Activations and the rotation (step {i + 1})", f"{note}.", "".join(plots) or None, grids)


def _quantization(i: int, facts: dict[str, Any]) -> Section:
    layers = facts.get("layers") or []
    known = ((layer["name"], layer["error"]) for layer in layers if layer.get("error") is not None)
    errors = {name: error for name, error in known if math.isfinite(error)}
    worst, most = sorted(errors, key=lambda name: -errors[name])[:5], max(errors.values(), default=0) or 1
    bits = Counter((layer["bits"], layer.get("activations", 16)) for layer in layers if layer.get("bits") is not None)
    counts = ", ".join(
        f"{count:,} at {number(width)} bits" + (f" with inputs at {number(inputs)}" if inputs < 16 else "")
        for (width, inputs), count in sorted(bits.items())
    )
    note = (
        "The squared error of each layer's outputs relative to their square (of its weights, where the method used no "
    )
    note += f"calibration); 0 is exact. Layers: {counts or number(len(layers))}"
    undrawn = [name for name in errors if place(name) is None or errors[name] <= 0]
    note += f". Not drawn (no block number, or no error): {words('', undrawn)}." if undrawn else "."
    rows = [[Cell(name), Cell(four_digits(errors[name]), bar=max(0.0, errors[name] / most))] for name in worst]
    grid = Grid(rows, ["layers with the largest error", "relative error"], numbers=True)
    figure = error_plot(f"error-{i}", errors)
    return Section(f"Quantization error by layer (step {i + 1})", note, figure, [grid] if rows else [])


def _skipped(i: int, facts: dict[str, Any]) -> Section:
    reasons: dict[str, list[str]] = {}
    for layer in facts.get("skipped") or []:
        reasons.setdefault(layer["reason"], []).append(layer["name"])
    rows = [
        [Cell(reason, f"{len(names):,} layer{'s' if names[1:] else ''}"), Cell(words("", names))]
        for reason, names in reasons.items()
    ]
    return Section(
        f"Layers that were not quantized (step {i + 1})", grids=[Grid(rows, ["reason", "layers"])] if rows else []
    )


def _costs(report: Report) -> Section:
    """Time and memory of each step, measured against the plan's estimate."""
    steps = report["steps"]
    columns = {
        "time": [step["seconds"] for step in steps],
        "peak memory": [step.get("peak_rss_bytes") for step in steps],
        "peak device memory": [step.get("peak_device_bytes") for step in steps],
        "estimated memory": [_estimate(report, i) for i in range(len(steps))],
    }
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    most = max((v for name, values in columns.items() if name != "time" for v in values if v is not None), default=0)
    rows = [[Cell(f"{i + 1}. {step['step']}")] for i, step in enumerate(steps)]
    for name, values in columns.items():
        key, full = ("seconds", max(columns["time"])) if name == "time" else ("bytes", most)
        for row, value in zip(rows, values, strict=True):
            row.append(
                Cell(words(key, value), bar=value / full if value is not None and 0 <= value <= full > 0 else None)
            )
    note = f"{words('seconds', sum(columns.get('time', [])))} in all. All bars of memory have one scale."
    return Section("Time and memory", note, grids=[Grid(rows, ["step", *columns], numbers=True)] if rows else [])


def _estimate(report: Report, i: int) -> float | None:
    """The plan's estimate of the memory of step `i`, in bytes, where the plan has that step at that place."""
    planned = (report.get("plan") or {"steps": []})["steps"][i : i + 1]
    return planned[0].get("memory_bytes") if planned and planned[0]["step"] == report["steps"][i]["step"] else None


def _facts(report: Report) -> Section:
    grids = []
    for i, step in enumerate(report["steps"]):
        pairs = {key: value for key, value in step["facts"].items() if key not in _DRAWN_ELSEWHERE}
        if pairs:
            grids.append(_pairs(_flat(pairs), f"{i + 1}. {step['step']}"))
    return Section("What each step reports", grids=grids)


def _pairs(pairs: Iterator[tuple[str, Any]], caption: str = "") -> Grid:
    return Grid([[Cell(name.replace("_", " ")), Cell(words(name, value))] for name, value in pairs], caption=caption)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


# Several runs


class Row(NamedTuple):
    """One line of a comparison: a value for each run, or None, and what makes them hard to compare, if anything."""

    name: str
    values: list[float | None]
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; changes are against the first.

    `target` is the final smoothed loss of the first run (None if it trained nothing) and `span` the training steps
    the smoothing looks back over, the same for all runs; the row `steps_to_target` says when each run reaches it.
    `differences` are the recipe's keys whose values are not the same in all runs.
    """

    runs: list[str]
    table: list[Row]
    target: float | None
    span: float
    curves: list[Curve | None]
    differences: dict[str, list[Any]]
    version: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is unknown or not a finite number is null."""
        rows = [{"name": r.name, "values": [_finite(v) for v in r.values], "note": r.note} for r in self.table]
        target = None if self.target is None else {"loss": self.target, "smoothing_steps": self.span}
        return {"runs": self.runs, "table": rows, "target": target, "differences": self.differences}

    def to_text(self, width: int = 100) -> str:
        """The comparison as plain text, at most `width` columns wide."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as capture:
            print_comparison(self, console)
        return capture.get()


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare run folders (or their report.json files), one or more; the first is the one others are held against.

    Training is compared by the last train step of each run, in training steps whatever their batch size.
    Raises `FormatError`.
    """
    reports, trained = [read_report(run) for run in runs], [read_curves(run) for run in runs]
    curves = [list(each.values())[-1] if each else None for each in trained]
    first = curves[0]
    span = first.span if first is not None else 1.0
    smooth = [curve.smoothed(span) if curve is not None else {} for curve in curves]
    target = list(smooth[0].values())[-1] if smooth[0] else None
    columns = [_last_values(report) for report in reports]
    for column, losses in zip(columns, smooth, strict=True):
        if losses:
            column[Metric("final_smoothed_loss")] = list(losses.values())[-1]
        reached = [step for step, loss in losses.items() if target is not None and loss <= target]
        if reached:
            column[Metric("steps_to_target")] = reached[0]
    recipes = [dict(_flat(report["recipe"])) for report in reports]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key != "name")
    differences = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    differences = {key: values for key, values in differences.items() if any(v != values[0] for v in values)}
    return Comparison(_run_names(runs), _table(columns), target, span, curves, differences, reports[0]["slimtune"])


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the comparison to `console` as one table: green is better than the first run, orange is worse."""
    grille = Grille("")
    for name in comparison.runs:
        grille.add_column(Text(name), justify="right")
    tones = {"good": "green", "bad": "dark_orange", "": "default"}
    for row in comparison.table:
        cells = ((cell, f" ({cell.small})" if cell.small else "") for cell in versus_first(row.name, row.values))
        told = [Text.assemble(cell.text, (change, tones[cell.tone])) for cell, change in cells]
        grille.add_row(Text(label(row.name) + (f" ({row.note})" if row.note else "")), *told)
    console.print(grille)


def write_comparison_html(comparison: Comparison, path: Path) -> Path:
    """Write the comparison as one self-contained HTML file, and return its path."""
    runs, target = comparison.runs, comparison.target
    rows = [[Cell(label(row.name), row.note), *versus_first(row.name, row.values)] for row in comparison.table]
    series = [
        Series(name, list(smooth), list(smooth.values()))
        for name, curve in zip(runs, comparison.curves, strict=True)
        if curve and (smooth := curve.smoothed(comparison.span))
    ]
    note = f"Smoothed over about {number(comparison.span)} training steps in every run."
    differing = [[Cell(key), *(Cell(words("", v)) for v in values)] for key, values in comparison.differences.items()]
    sections = [
        Section("Last measurements and costs", grids=[Grid(rows, ["", *runs], numbers=True)]),
        Section("Training loss", note, loss_plot("loss", series, target) if series else None),
        Section("What differs in the recipes", grids=[Grid(differing, ["key", *runs])] if differing else []),
    ]
    title = f"{len(runs)} runs compared" if len(runs) > 1 else runs[0]
    summary = f"Changes are against the first run, {runs[0]}."
    return write_page(path, Page(title, ", ".join(runs), summary, [], sections, comparison.version))


def _last_values(report: Report) -> dict[Metric, float | None]:
    values = {metric: list(series.values())[-1] for metric, series in metrics(report).items()}
    known = (name for name in ("parameters", "bytes", "bits_per_weight") if name in report["model"])
    values = {Metric(name): report["model"][name] for name in known} | values
    values[Metric("seconds")] = sum(step["seconds"] for step in report["steps"])
    for key in ("peak_rss_bytes", "peak_device_bytes"):
        values[Metric(key)] = max((step[key] for step in report["steps"] if step.get(key) is not None), default=None)
    return values


def _table(columns: Sequence[dict[Metric, float | None]]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(metric.name for column in columns for metric in column):
        found = [{m: v for m, v in column.items() if m.name == name} for column in columns]
        values = [list(f.values())[-1] if f else None for f in found]
        ways = {list(f)[-1][1:] for f in found if f}
        if any(value is not None for value in values):
            rows.append(Row(name, values, "measured on different texts, windows or samples" if len(ways) > 1 else ""))
    return rows


def _run_names(runs: Sequence[Path]) -> list[str]:
    """The shortest tails of the folders' paths that tell them apart."""
    parts = [report_path(run.resolve()).parent.parts for run in runs]
    depth = next((d for d in range(1, 9) if len({p[-d:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-depth:]) for p in parts]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
