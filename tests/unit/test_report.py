"""The report page and the comparison of runs, on run folders made by hand."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from slimtune.errors import FormatError
from slimtune.recipe.page import Page, Section, duration, number, size, versus_first, words, write_page
from slimtune.recipe.plots import Series, error_plot, loss_plot, place, width_plot
from slimtune.recipe.record import Curve, read_curves
from slimtune.recipe.report import compare, print_comparison, read_report, write_comparison_html, write_html

HOSTILE = "</title></pre><script>alert('$x^{')</script><img src=\"http://evil.example/a.png\">"


def step(name: str, seconds: float = 2.0, peak: int | None = 1_000_000_000, **facts: Any) -> dict[str, Any]:
    return {"step": name, "seconds": seconds, "peak_rss_bytes": peak, "peak_device_bytes": None, "facts": facts}


def perplexity(after: int, value: float, length: int = 512) -> dict[str, Any]:
    return {"after_step": after, "name": "wikitext2_perplexity", "value": value, "tokens": 289077, "length": length}


LAYERS = [
    {"name": f"model.layers.{block}.{kind}", "bits": 4, "shape": [8, 8], "error": 0.01 * (block + 1) * weight}
    for block in range(3)
    for kind, weight in (("mlp.wide", 1.0), ("attn.narrow", 2.0))
]
SKIPPED = [{"name": "head", "reason": "tied to the embedding"}]
REPORT: dict[str, Any] = {
    "slimtune": "0.1.0",
    "recipe": {"name": "first try", "model": "tiny-llama", "seed": 0, "steps": [{"evaluate": {}}]},
    "environment": {"python": "3.11.2", "cores": 2, "memory_bytes": 16_000_000_000},
    "steps": [
        step("evaluate"),
        step("quantize", 187.6, method="optq", bits=4, group_size=64, layers=LAYERS, skipped=SKIPPED),
        step("evaluate"),
        step("lora", r=16, trainable_parameters=4_884_480),
        step("train", 905.0, 3_420_000_000, steps=40, sample="<|user|>\nhello & goodbye"),
        step("evaluate"),
    ],
    "metrics": [
        *(perplexity(i, value) for i, value in ((0, 28.714), (2, 31.204), (5, 29.4))),
        *(
            {"after_step": i, "name": "bytes", "value": v}
            for i, v in ((0, 538_060_672), (2, 180_112_384), (5, 180_112_384))
        ),
    ],
    "model": {"parameters": 134_515_008, "bytes": 180_112_384, "bits_per_weight": 4.375},
    "plan": {"steps": [{"step": "evaluate"}, {"step": "quantize", "memory_bytes": 1_700_000_000}]},
}
LOSSES = [4.0 - 0.05 * k for k in range(1, 41)]


def write_run(folder: Path, report: dict[str, Any] = REPORT, losses: list[float] = LOSSES, every: int = 1) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    lines = [json.dumps({"step": every * k, "loss": loss}) + "\n" for k, loss in enumerate(losses, 1)]
    if losses:
        (folder / "train_log.jsonl").write_text("".join(lines))
    return folder


def changed(**keys: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | keys


class Tags(HTMLParser):
    """Every tag, every attribute and the text between tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path) -> Tags:
    tags = Tags(write_html(run).read_text(encoding="utf-8"))
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    return tags


# The page of one run


def test_page_tells_the_numbers(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run")).text
    for told in ("first try", "quantized to 4 bits with optq in groups of 64", "28.71", "31.20", "29.40", "+8.7 %"):
        assert told in text
    assert "model size 538.1 MB at the start, 180.1 MB after quantize." in text
    for told in (
        "after train",
        "3.42 GB",
        "1.70 GB",
        "15 min 5 s",
        "4.375",
        "4,884,480",
        "289,077 tokens",
        "6 at 4 bits",
    ):
        assert told in text
    for told in ("hello & goodbye", "tied to the embedding", "16.00 GB", "seed: 0", "model.layers.2.attn.narrow"):
        assert told in text


def test_page_loads_nothing(tmp_path: Path) -> None:
    path = write_html(write_run(tmp_path / "run"))
    page = path.read_text(encoding="utf-8")
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "train_log.jsonl"]
    assert "://" not in page and "@import" not in page
    tags = Tags(page)
    assert tags.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(tags.tags)
    for name, value in tags.attributes:
        assert name not in ("src", "srcset", "data") and not name.startswith("on")
        assert not name.endswith("href") or (value or "").startswith("#")


def test_references_resolve(tmp_path: Path) -> None:
    tags = page_of(write_run(tmp_path / "run"))
    ids = {value for name, value in tags.attributes if name == "id"}
    used = {v[1:] for name, v in tags.attributes if v and name.endswith("href")}
    used |= {m for _, v in tags.attributes for m in re.findall(r"url\(#([^)]*)\)", v or "")}
    assert used and used <= ids


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    layers = [{"name": f"model.layers.0.{HOSTILE.replace('.', '')}\x07", "error": 0.1, "bits": 4}]
    steps = [step("quantize", method=HOSTILE, layers=layers, skipped=[{"name": HOSTILE, "reason": HOSTILE}])]
    steps += [step(HOSTILE, note=HOSTILE), step("train", sample=HOSTILE)]
    metrics = [{"after_step": 1, "name": HOSTILE, "value": 1.0}]
    recipe = {"name": HOSTILE, "model": HOSTILE}
    report = changed(recipe=recipe, steps=steps, metrics=metrics, environment={HOSTILE: HOSTILE}, slimtune=HOSTILE)
    run = write_run(tmp_path / "run", report)
    tags = page_of(run)
    assert not {"script", "img"} & set(tags.tags)
    assert tags.tags.count("svg") == 2
    assert tags.text.count(HOSTILE) > 8
    comparison = compare([run, run])
    assert not {"script", "img"} & set(Tags(write_comparison_html(comparison, tmp_path / "c.html").read_text()).tags)


@pytest.mark.parametrize("kept", [[], ["evaluate"], ["evaluate", "quantize"], ["lora", "train"], ["train"]])
def test_page_without_some_steps(tmp_path: Path, kept: list[str]) -> None:
    steps = [step(name) for name in kept]  # and without any facts
    report = changed(steps=steps, metrics=[], model={}, plan=None, recipe={}, environment={})
    run = write_run(tmp_path / "run", report, LOSSES if "train" in kept else [])
    tags = page_of(run)
    assert ("Training" in tags.text) == ("train" in kept)
    assert tags.tags.count("svg") == ("train" in kept)
    assert "Time and memory" in tags.text or not kept
    assert "Before and after" not in tags.text and "Environment" not in tags.text
    assert "nan" not in tags.text and "None" not in tags.text


def test_two_trainings_give_two_plots(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", changed(steps=[step("train"), step("merge"), step("train")], metrics=[]), [])
    lines = [{"step": k, "loss": 3.0, "train": train} for train in (0, 2) for k in (1, 2)]
    (run / "train_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tags = page_of(run)
    assert tags.tags.count("svg") == 2
    assert "Training (step 1)" in tags.text and "Training (step 3)" in tags.text
    assert read_curves(run) == {train: Curve({1: 3.0, 2: 3.0}, {}) for train in (0, 2)}


def test_two_measurements_after_the_same_step_are_told_apart(tmp_path: Path) -> None:
    report = changed(metrics=[perplexity(0, 20.0), perplexity(2, 30.0), perplexity(3, 40.0), perplexity(5, 25.0)])
    report["steps"][3] = step("evaluate")
    text = page_of(write_run(tmp_path / "run", report)).text
    assert "after quantize (step 3)" in text and "after quantize (step 4)" in text


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_html(run).read_bytes()
    assert write_html(run / "report.json").read_bytes() == first


# What is read


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (["steps"], None, "steps"),
        (["steps"], {}, "steps"),
        (["steps", 1, "seconds"], "long", "steps[1].seconds"),
        (["steps", 1, "facts"], [], "steps[1].facts"),
        (["steps", 1, "facts", "layers"], {}, "steps[1].facts.layers"),
        (["steps", 1, "facts", "layers", 0, "error"], "0.1", "steps[1].facts.layers[0].error"),
        (["steps", 4, "facts", "sample"], 3, "steps[4].facts.sample"),
        (["metrics", 0, "name"], 3, "metrics[0].name"),
        (["metrics", 0, "value"], True, "metrics[0].value"),
        (["metrics", 0, "after_step"], 6, "metrics[0].after_step"),
        (["metrics", 0, "after_step"], -1, "metrics[0].after_step"),
        (["model"], 7, "model"),
        (["plan", "steps"], 7, "plan.steps"),
    ],
)
def test_malformed_key_is_named(tmp_path: Path, path: list[Any], value: Any, where: str) -> None:
    report = copy.deepcopy(REPORT)
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FormatError, match=re.escape(f"report.json: {where}\n")):
        read_report(write_run(tmp_path / "run", report))


@pytest.mark.parametrize("key", ["slimtune", "recipe", "environment", "steps", "metrics", "model"])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    report = {k: v for k, v in REPORT.items() if k != key}
    with pytest.raises(FormatError, match=f"report.json: {key}\n"):
        read_report(write_run(tmp_path / "run", report))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"slimtune": "\\ud800"}', "9" * 400, "\xff"])
def test_not_a_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=r"report\.json"):
        write_html(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_values_no_page_can_hold(tmp_path: Path) -> None:
    for name, value in (("half", "\ud800"), ("large", 10**400)):
        with pytest.raises(FormatError, match="not a JSON file"):
            write_html(write_run(tmp_path / name, changed(environment={name: value})))


def test_missing_report(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no report here"):
        read_report(tmp_path / "nowhere")


def test_log_of_a_resumed_run(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 9.0}', '{"step": 2, "loss": 2.0, "eval_loss": 2.5}']
    lines += ['{"step": 3, "loss": NaN}', '{"step": 4, "lo']
    (tmp_path / "train_log.jsonl").write_text("\n".join(lines))
    assert read_curves(tmp_path) == {None: Curve({1: 3.0, 2: 2.0}, {2: 2.5})}


@pytest.mark.parametrize("line", ['{"step": 1, "lo', '{"loss": 1.0}', '{"step": 1, "loss": "2"}', "[]"])
def test_malformed_log_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 3.0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(FormatError, match=r"train_log.jsonl: line 2"):
        read_curves(tmp_path)


# Several runs


def row(comparison: Any, name: str) -> list[float | None]:
    return next(list(r.values) for r in comparison.table if r.name == name)


def test_smoothed_loss_is_the_weighted_mean_of_the_past() -> None:
    losses = {1: 4.0, 2: 1.0, 5: 3.0}
    for step, smooth in Curve(losses, {}).smoothed(2.0).items():
        # each loss stands for the steps since the one before it
        weights, last = {}, 0
        for s in (s for s in losses if s <= step):
            weights[s] = sum(math.exp(-(step - k) / 2.0) for k in range(last + 1, s + 1))
            last = s
        assert smooth == pytest.approx(sum(weights[s] * losses[s] for s in weights) / sum(weights.values()))


def test_steps_to_the_first_runs_final_loss(tmp_path: Path) -> None:
    twice = [4.0 - 0.10 * k for k in range(1, 41)]  # falls twice as fast, so it is there in half the steps
    runs = [write_run(tmp_path / "slow"), write_run(tmp_path / "fast", losses=twice)]
    runs += [write_run(tmp_path / "stuck", losses=[4.0] * 40), write_run(tmp_path / "untrained", losses=[])]
    comparison = compare(runs)
    slow, fast, stuck, untrained = row(comparison, "steps_to_target")
    assert comparison.span == 2.0
    assert slow == 40 and stuck is None and untrained is None
    reached = [k for k, loss in Curve(dict(enumerate(twice, 1)), {}).smoothed(2.0).items() if loss <= comparison.target]
    assert fast == reached[0] and 20 <= fast <= 22
    assert row(comparison, "final_smoothed_loss")[0] == comparison.target == pytest.approx(2.0, abs=0.15)


def test_logging_more_rarely_does_not_change_what_a_step_is(tmp_path: Path) -> None:
    rare = [4.0 - 0.05 * k for k in range(4, 41, 4)]
    slow, seldom = row(
        compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", losses=rare, every=4)]), "steps_to_target"
    )
    assert (slow, seldom) == (40, 40)


def test_comparison_takes_last_values_and_costs(tmp_path: Path) -> None:
    better = changed(
        metrics=[perplexity(0, 28.714), perplexity(5, 24.5)], model={"bytes": 90_000_000, "family": "llama"}
    )
    better["recipe"] |= {"seed": 1, "name": "second try"}
    comparison = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", better)])
    assert comparison.runs == ["a", "b"]
    assert row(comparison, "wikitext2_perplexity") == [29.4, 24.5]
    assert row(comparison, "bytes") == [180_112_384, 90_000_000]
    assert row(comparison, "bits_per_weight") == [4.375, None]
    assert row(comparison, "seconds") == [pytest.approx(1100.6)] * 2
    assert row(comparison, "peak_rss_bytes") == [3_420_000_000] * 2
    assert comparison.differences == {"seed": [0, 1]}
    text = comparison.to_text(60)
    assert "24.50 (-16.7 %)" in text and "3.42 GB" in text and max(map(len, text.splitlines())) <= 60
    page = Tags(write_comparison_html(comparison, tmp_path / "out" / "c.html").read_text())
    assert "24.50" in page.text and page.tags.count("svg") == 1 and "://" not in page.text


def test_perplexities_of_different_windows_are_marked(tmp_path: Path) -> None:
    other = changed(metrics=[perplexity(5, 20.0, length=2048)])
    comparison = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", other)])
    notes = {r.name: r.note for r in comparison.table}
    assert "different" in notes["wikitext2_perplexity"] and not notes["bytes"]


def test_comparison_as_json_has_no_nan(tmp_path: Path) -> None:
    diverged = changed(metrics=[perplexity(5, math.inf)])
    comparison = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", diverged)])
    told = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    values = {r["name"]: r["values"] for r in told["table"]}
    assert values["wikitext2_perplexity"] == [29.4, None]
    assert told["target"]["smoothing_steps"] == 2.0


def test_runs_of_one_name_are_told_apart_and_markup_is_text(tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
    comparison = compare([write_run(tmp_path / "x" / "[red]run"), write_run(tmp_path / "y" / "[red]run")])
    assert comparison.runs == ["x/[red]run", "y/[red]run"]
    console = Console(file=io.StringIO(), width=160)
    with console.capture() as capture:
        print_comparison(comparison, console)
    assert "x/[red]run" in capture.get()


# Pages and plots


def test_numbers_for_people() -> None:
    assert [number(v) for v in (0, 4.375, 1234567, 12345.6, 2e-4)] == ["0", "4.375", "1,234,567", "12,346", "0.0002"]
    assert [size(v) for v in (999, 1000, 538_060_672, 3_420_000_000)] == ["999 bytes", "1.0 kB", "538.1 MB", "3.42 GB"]
    assert [duration(v) for v in (0.25, 59.9, 61, 7384)] == ["0.25 s", "59.9 s", "1 min 1 s", "2 h 3 min"]
    assert words("x", list(range(20))).endswith("10, 11, and 8 more")
    assert words("x", math.nan) == words("seconds", math.nan).removesuffix(" s") == words("bytes", math.nan) == "nan"


def test_change_is_good_or_bad_by_what_is_measured() -> None:
    for name, tone in (("a_perplexity", "good"), ("bytes", "good"), ("arc_acc", "bad"), ("parameters", "")):
        assert [(c.small, c.tone) for c in versus_first(name, [4.0, 2.0, 4.0])] == [
            ("", ""),
            ("-50.0 %", tone),
            ("", ""),
        ]
    assert [c.small for c in versus_first("loss", [None, 2.0, math.inf, 3.0])] == ["", "", "", "+50.0 %"]


def test_empty_sections_are_left_out(tmp_path: Path) -> None:
    page = Page("title", "", "", [], [Section("gone", note="a note"), Section("here", text="text")], "0")
    text = Tags(write_page(tmp_path / "page.html", page).read_text()).text
    assert "here" in text and "gone" not in text


def test_error_plot_groups_by_block_and_kind() -> None:
    assert place("encoder.block.3.layer.0.wide") == ("encoder.block", 3, "wide")
    assert place("3.wide") == ("", 3, "wide")
    svg = error_plot("e", {"encoder.block.0.wide": 0.1, "decoder.block.0.wide": 0.2, "decoder.block.1.deep": 0.2})
    assert svg is not None and re.findall(r"block of (\w+)", svg) == ["encoder", "decoder"]
    assert svg.count(">wide<") == 2 and svg.count(">deep<") == 1
    assert error_plot("e", {"head": 0.1, "model.layers.0.wide": 0.0}) is None


def test_odd_labels_are_drawn_as_they_are() -> None:
    svg = error_plot("e", {"layers.0.$x^{$ <b>\x07": 0.1, "layers.0._hidden": 0.1, "layers.0.日本": 0.1})
    assert svg is not None
    for label in ("$x^{$ &lt;b&gt;?", ">hidden<", ">日本<"):
        assert label in svg


def test_one_spike_does_not_flatten_the_loss_plot() -> None:
    steps = list(range(200))
    calm = loss_plot("a", [Series("loss", steps, [1e4 if s == 7 else 2.0 + s / 200 for s in steps], "faint")])
    assert ">2.5<" in calm or ">2.4<" in calm


def test_a_rotation_is_told_with_its_pictures(tmp_path: Path) -> None:
    layers = [
        {"name": layer["name"], "kurtosis_before": 87.25, "kurtosis_after": 2.875, "peak_before": 9, "peak_after": 2}
        for layer in LAYERS
    ]
    channels = {"name": "model.layers.0.mlp.wide", "before": [1.0, 500.0, 2.0], "after": [3.0, 4.0, 3.5]}
    rotated = step("rotate", kind="hadamard", layers=layers, channels=channels)
    tags = page_of(write_run(tmp_path / "run", changed(steps=[rotated], metrics=[], plan=None)))
    assert tags.tags.count("svg") == 3
    for told in ("rotated (hadamard)", "87.25", "2.875", "kurtosis before", "input of model.layers.0.mlp.wide"):
        assert told in tags.text
    layers[0]["kurtosis_after"] = "high"
    with pytest.raises(FormatError, match=r"layers\[0\].kurtosis_after"):
        write_html(write_run(tmp_path / "bad", changed(steps=[rotated], metrics=[], plan=None)))


def points(svg: ElementTree.Element) -> list[float]:
    """The heights of the markers in a plot, those of its legend aside."""
    axes = next(node for node in svg.iter("g") if node.get("id", "").endswith("-axes_1"))
    lines = [group for group in axes.findall("g") if "-line2d" in group.get("id", "")]
    return [-float(use.attrib["y"]) for group in lines for use in group.iter("use")]


def test_how_every_layer_started_is_drawn(tmp_path: Path) -> None:
    """Markers stand where the numbers of `report.json` are, on axes that are logarithmic."""
    numbers = {"energy": (0.9, 0.55, 0.8, 0.6, 0.7, 0.5), "ratio": (0.02, 0.3, 0.1, 0.25, 0.04, 0.05)}
    layers = [
        {"name": layer["name"], "rank": 4, "note": ""} | {key: value[n] for key, value in numbers.items()}
        for n, layer in enumerate(LAYERS)
    ]
    started = step("lora", init="lora-ga", r=4, layers=layers)
    run = write_run(tmp_path / "run", changed(steps=[started], metrics=[], plan=None))
    tags, page = page_of(run), (run / "report.html").read_text()
    found = {e.get("aria-label"): e for e in map(ElementTree.fromstring, re.findall(r"<svg.*?</svg>", page, re.S))}
    assert sorted(found) == ["captured by block", "size of the start by block"]  # no overlap is known
    for title, key in (("captured by block", "energy"), ("size of the start by block", "ratio")):
        wide, narrow = numbers[key][::2], numbers[key][1::2]  # one kind after the other
        heights, logs = points(found[title]), [math.log(value) for value in (*wide, *narrow)]
        assert len(heights) == 6
        slope = (heights[1] - heights[0]) / (logs[1] - logs[0])
        assert slope > 0
        for height, log in zip(heights, logs, strict=True):
            assert height == pytest.approx(heights[0] + slope * (log - logs[0]), abs=1e-3 * abs(slope))
    assert "0.5500 to 0.6000" not in tags.text and "0.5000 to 0.6000" in tags.text  # the table says it by kind
    nothing = [{**layer, "energy": None, "ratio": 0.0} for layer in layers]
    plain = step("lora", init="default", r=4, layers=nothing)
    empty = page_of(write_run(tmp_path / "plain", changed(steps=[plain], metrics=[], plan=None)))
    assert "svg" not in empty.tags and "Where the adapter starts" in empty.text


def test_plots_ignore_the_users_matplotlib_settings() -> None:
    import matplotlib

    series = [Series("loss", [1, 2], [3.0, 2.0])]
    plain = loss_plot("a", series)
    with matplotlib.rc_context({"axes.linewidth": 9, "font.size": 30, "svg.fonttype": "path"}):
        assert loss_plot("a", series) == plain
        assert matplotlib.rcParams["font.size"] == 30


AXES = [
    {"name": f"model.layers.{block}.{name}", "kind": kind, "units": units, "kept": kept, "real": kept - (block == 2)}
    for block in range(3)
    for name, kind, units, kept in (("attn.out", "kv", 3, 3), ("mlp.out", "ffn", 1536, 1128))
]
PRUNED = {
    "axes": AXES,
    "parameters_before": 134_515_008,
    "parameters_after": 113_302_080,
    "removed_ratio": 0.199,
    "of": "blocks",
    "padded": True,
    "requantized": [{"name": "model.layers.0.mlp.out", "reason": "groups of 64 columns were broken"}],
    "history": {"5": 0.05, "10": 0.199},
    "losses": {"0": 3.0, "5": 3.25, "10": 3.5},
    "latency": {"ffn": [[768, 412.5], [1536, 803.0]]},
    "cost": {
        "before": {"bytes": 538_000_000, "decode_tokens_per_second": 20.0},
        "after": {"bytes": 453_000_000, "decode_tokens_per_second": 24.5},
    },
}


def section_of(page: str, title: str) -> str:
    return page.partition(title)[2].partition("<section")[0]


@pytest.mark.parametrize("ramp", [False, True])
def test_what_every_block_has_kept_is_drawn(ramp: bool, tmp_path: Path) -> None:
    report = copy.deepcopy(REPORT)
    report["steps"] = [step("train", steps=4, prune=PRUNED) if ramp else step("prune", **PRUNED)]
    report["metrics"] = []
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = write_html(tmp_path).read_text()
    told = section_of(page, "Widths after pruning (step 1)</h2>")
    assert "<svg" in told and "widths-0-" in told
    for text in (
        "134,515,008 parameters before, 113,302,080 after",
        "19.9%",
        "FFN channels",
        "1,128",
        "1,127",
        "1,536",
        "538.0 MB",
        "412.5",
        "453.0 MB",
        "24.5",
        "33.12",
        "schedule-0-",
    ):
        assert text in told, text
    assert "padded with zeros" in told and "groups of 64 columns were broken" in told


def test_a_step_that_cut_nothing_yet_has_no_widths(tmp_path: Path) -> None:
    report = copy.deepcopy(REPORT)
    report["steps"], report["metrics"] = [step("prune", ratio=0.5, acts="in the next train step")], []
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = write_html(tmp_path).read_text()
    assert "Widths after pruning" not in page and "in the next train step" in page


def test_there_is_nothing_to_draw_without_block_numbers() -> None:
    assert width_plot("w", {}) is None and width_plot("w", {"layers": []}) is None
