"""What a run recorded: its `report.json` and `train_log.jsonl`, checked on the way in.

Whatever is malformed is a `FormatError` that names the key or the line, so what reads these values need not doubt them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slimtune.errors import FormatError

Report = dict[str, Any]

# The shape of the files read here. A type, or a list or dict of shapes; float takes any number; `key?` may be absent
# or null; keys not named here are free.
_LOG_LINE = {"step": int, "loss?": float, "eval_loss?": float, "train?": int}
_STEP = {"step": str, "seconds": float, "peak_rss_bytes?": float, "peak_device_bytes?": float, "facts": dict}
_REPORT = {
    "slimtune": str,
    "recipe": {"name?": str, "model?": str, "steps?": [dict]},
    "environment": dict,
    "steps": [_STEP],
    "metrics": [{"after_step": int, "name": str, "value?": float, "tokens?": int, "length?": int, "samples?": int}],
    "model": {"parameters?": int, "bytes?": int, "bits_per_weight?": float},
    "plan?": {"steps": [{"step": str, "memory_bytes?": float}]},
}
_PRUNED = {
    "axes?": [{"name": str, "kind": str, "units": int, "kept": int, "real": int}],
    "history?": dict,
    "losses?": dict,
    "latency?": dict,
    "cost?": {"before": dict, "after": dict},
}
_FACTS: dict[str, Any] = {
    "prune": _PRUNED,
    "quantize": {
        "layers?": [{"name": str, "error?": float, "bits?": float, "activations?": float}],
        "skipped?": [{"name": str, "reason": str}],
    },
    "rotate": {
        "layers?": [{"name": str, "kurtosis_before": float, "kurtosis_after": float, "peak_before": float}],
        "channels?": {"name": str, "before": [float], "after": [float]},
    },
    "train": {"sample?": str, "prune?": _PRUNED},
    "lora": {
        "layers?": [
            {
                "name": str,
                "rank?": float,
                "ratio?": float,
                "energy?": float,
                "overlap?": float,
                "gradient_norm?": float,
                "note?": str,
            }
        ],
        "gradients?": {"tokens": int},
    },
    "export": {"cut?": [{"name": str, "rank": float, "error": float}], "error?": float},
}
_WORDS = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Curve:
    """Losses (nats per token) of one train step, keyed by training step, in order."""

    losses: dict[int, float]
    evaluations: dict[int, float]

    @property
    def span(self) -> float:
        """Training steps a smoothed loss looks back over: a twentieth of the run, and at least one."""
        return max(1.0, max(self.losses, default=1) / 20)

    def smoothed(self, span: float) -> dict[int, float]:
        """The running mean with weights `exp(-age / span)`, ages in training steps; it never looks ahead.

        >>> Curve({1: 4.0, 2: 2.0}, {}).smoothed(1.0)[1]
        4.0
        """
        means, total, weight, last = {}, 0.0, 0.0, 0
        for step, loss in self.losses.items():
            keep = math.exp(-max(step - last, 1) / span)
            total, weight, last = keep * total + (1 - keep) * loss, keep * weight + (1 - keep), step
            means[step] = total / weight
        return means


def read_report(run: Path) -> Report:
    """The checked content of a run's `report.json`; `run` is the run folder or the file itself.

    Raises `FormatError` naming the key where the file is missing, is not JSON or does not have the shape of a report.
    """
    path = report_path(run)
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
        json.dumps(report, ensure_ascii=False).encode()  # half a surrogate pair is legal JSON that no file can hold
    except OSError as error:
        remedy = "name a folder that `slimtune run` wrote"
        raise FormatError("no report here", where=str(path), got=error.strerror, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise FormatError("not a JSON file", where=str(path), got=error) from error
    _check(report, _REPORT, f"{path}: ")
    for i, step in enumerate(report["steps"]):
        _check(step["facts"], _FACTS.get(step["step"], {}), f"{path}: steps[{i}].facts")
    for i, metric in enumerate(report["metrics"]):
        if not 0 <= metric["after_step"] < len(report["steps"]):
            where, wanted = f"{path}: metrics[{i}].after_step", f"the index of one of {len(report['steps'])} steps"
            raise FormatError("malformed run folder", where=where, got=metric["after_step"], wanted=wanted)
    return report


def read_curves(run: Path) -> dict[int | None, Curve]:
    """The losses in a run's `train_log.jsonl`, keyed by the index of the train step, or None where the
    lines name none; in the order of training, and empty where the run trained nothing.

    Where a resumed run logged a step twice the later line counts. A last line that was cut short is left out.
    Raises `FormatError` naming the line.
    """
    path = report_path(run).with_name("train_log.jsonl")
    curves: dict[int | None, Curve] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = json.loads(line, parse_int=_whole)
        except (ValueError, RecursionError) as error:
            if i == len(lines) - 1:
                break
            raise FormatError("not a JSON line", where=f"{path}: line {i + 1}", got=error) from error
        _check(entry, _LOG_LINE, f"{path}: line {i + 1}: ")
        curve = curves.setdefault(entry.get("train"), Curve({}, {}))
        for values, key in ((curve.losses, "loss"), (curve.evaluations, "eval_loss")):
            if entry.get(key) is not None and math.isfinite(entry[key]):
                values[entry["step"]] = entry[key]
    return {
        train: Curve(dict(sorted(curve.losses.items())), dict(sorted(curve.evaluations.items())))
        for train, curve in curves.items()
        if curve.losses
    }


def report_path(run: Path) -> Path:
    """The report of `run`, which is a run folder or the report itself."""
    return run if run.name == "report.json" else run / "report.json"


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError("a whole number too large for a float")
    return int(digits)


def _check(value: Any, shape: Any, where: str) -> None:
    kind: Any = shape if isinstance(shape, type) else type(shape)
    wanted: Any = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise FormatError("malformed run folder", where=where, got=f"{value!r:.80}", wanted=_WORDS[kind])
    if isinstance(shape, list):
        for i, item in enumerate(value):
            _check(item, shape[0], f"{where}[{i}]")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            inside = where + name if where.endswith(": ") else f"{where}.{name}"
            if name not in value and name == key:
                raise FormatError("malformed run folder", where=inside, got="nothing", wanted="this key")
            if value.get(name) is not None or name == key:
                _check(value[name], inner, inside)


class Metric(NamedTuple):
    """What makes measurements comparable: the name, and how many tokens, of what window length, or samples it saw."""

    name: str
    tokens: int | None = None
    length: int | None = None
    samples: int | None = None


def metrics(report: Report) -> dict[Metric, dict[int, float | None]]:
    """The values of each metric, keyed by the index of the step they were measured after."""
    series: dict[Metric, dict[int, float | None]] = {}
    for m in report["metrics"]:
        series.setdefault(Metric(m["name"], m.get("tokens"), m.get("length"), m.get("samples")), {})[
            m["after_step"]
        ] = m.get("value")
    return series
