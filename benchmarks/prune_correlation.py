"""Which criterion knows what a group is worth: rank correlation with the loss that rises when the group really goes.

Groups are KV groups and runs of FFN channels of SmolLM2-135M, sampled over all layers. What each is worth is measured:
the mean loss of held-out windows with its gate closed, less that with all open, in float32. Every criterion scores the
same groups from calibration windows. Spearman's rho over all groups, over those of each kind, and the mean of those
within a layer (of a layer's FFN groups, which is all that uniform pruning asks for).

    python benchmarks/prune_correlation.py --calibration c4.jsonl.gz
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from slimtune.arch import bind
from slimtune.calib.data import calibration_tokens
from slimtune.calib.rows import DataSource, read_rows
from slimtune.export.load import load
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune import IMPORTANCES
from slimtune.prune.collect import collect
from slimtune.prune.groups import Axis, axes
from slimtune.prune.removal import MEASURED, loss_changes
from slimtune.recipe.run import environment

RESULT = Path(__file__).parent / "results" / "prune_correlation.json"
CRITERIA = tuple(name for name in IMPORTANCES if not IMPORTANCES[name].needs & MEASURED)


def coarse(axis: Axis, size: int) -> Axis:
    """The axis with so many of its channels as one unit."""
    if axis.kind != "ffn":
        return axis
    parts = tuple(replace(part, size=part.size * size) for part in axis.parts)
    return replace(axis, units=axis.units // size, parts=parts, parameters=axis.parameters * size)


def ranks(values: Tensor) -> Tensor:
    """Ranks, ties sharing their mean."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[place]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    x, y = (ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def scores_of(model_name: str, size: int, name: str, windows: Tensor, normalise: Any = "none") -> dict[str, Tensor]:
    """The scores of all groups by a criterion."""
    model: Any = load(model_name).model
    if name.startswith("lora"):
        model = add_lora(model, r=8)
    modelmap = bind(model)
    found = [coarse(axis, size) for axis in axes(modelmap)]
    return collect(base_of(model), modelmap, found, IMPORTANCES[name](), windows, normalise=normalise)


def say(done: int, of: int) -> None:
    """How far the measuring is."""
    if done % 50 == 0:
        print(f"{done} of {of}", flush=True)


def main() -> None:
    """Measure what groups are worth, score them by every criterion, and write the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="", help="rows of text; default: the built-in pydocs")
    parser.add_argument("--samples", type=int, default=32, help="windows that criteria look at")
    parser.add_argument("--held-out", type=int, default=8, help="windows on which the loss is measured")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--channels", type=int, default=64, help="FFN channels of a group")
    parser.add_argument("--ffn", type=int, default=7, help="FFN groups of a layer that are measured")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    source = DataSource(path=arguments.calibration) if arguments.calibration else DataSource(builtin="pydocs")
    loaded = load(arguments.model)
    count = arguments.samples + arguments.held_out
    windows = calibration_tokens(read_rows(source), loaded.tokenizer, count, arguments.length, seed=0)
    seen, held_out = windows[: arguments.samples], windows[arguments.samples :]
    modelmap = bind(loaded.model)
    found = [coarse(axis, arguments.channels) for axis in axes(modelmap)]
    generator = torch.Generator().manual_seed(0)
    units = {
        axis.name: sorted(torch.randperm(axis.units, generator=generator)[: arguments.ffn].tolist())
        if axis.kind == "ffn"
        else list(range(axis.units))
        for axis in found
    }
    groups = [(axis, unit) for axis in found for unit in units[axis.name]]
    print(f"{len(groups)} groups", flush=True)
    start = time.perf_counter()
    loaded.model.eval()
    changes = loss_changes(
        loaded.model,
        modelmap,
        found,
        held_out,
        units=units,
        progress=say,
    )
    truth = [float(changes[axis.name][unit]) for axis, unit in groups]
    facts: dict[str, Any] = {
        "environment": environment(),
        "model": Path(arguments.model).name,
        "seed": 0,
        "calibration": Path(str(source)).name,
        "samples": arguments.samples,
        "held_out": arguments.held_out,
        "length": arguments.length,
        "channels": arguments.channels,
        "groups": len(groups),
        "measuring_seconds": round(time.perf_counter() - start, 1),
        "rows": [],
    }
    del loaded
    for name in arguments.criteria:
        for normalise in ("none", "module") if name.startswith("lora") else ("none",):
            scores = scores_of(arguments.model, arguments.channels, name, seen, normalise)
            values = [float(scores[axis.name][unit]) for axis, unit in groups]
            row: dict[str, Any] = {"importance": name, "normalise": normalise, "all": round(spearman(values, truth), 3)}
            for kind in ("kv", "ffn"):
                mine = [i for i, (axis, _) in enumerate(groups) if axis.kind == kind]
                row[kind] = round(spearman([values[i] for i in mine], [truth[i] for i in mine]), 3)
            inside = []
            for axis in found:
                mine = [i for i, (other, _) in enumerate(groups) if other is axis]
                if axis.kind == "ffn" and len(mine) > 2:
                    inside.append(spearman([values[i] for i in mine], [truth[i] for i in mine]))
            row["ffn_within_a_layer"] = round(fmean(inside), 3) if inside else None
            facts["rows"].append(row)
            print(row, flush=True)
            facts["changes"] = [
                {"axis": axis.name, "unit": unit, "loss_change": round(change, 7)}
                for (axis, unit), change in zip(groups, truth, strict=True)
            ]
            arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
