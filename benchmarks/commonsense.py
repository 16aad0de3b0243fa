"""The commonsense average of model folders: ARC (easy, challenge), BoolQ, OpenBookQA, PIQA and WinoGrande, zero-shot.

    python benchmarks/commonsense.py FOLDER ... --data commonsense --output OUT.json

Folders are whatever slimtune loads: dense, rotated, quantized, runs with an adapter. `--data` is a folder with the
tests in LLM-Adapters' form, one file `<task>.test.json(.gz)` a task; no network is used. Of each task the first
`--limit` rows are asked. The score is `acc_norm` where lm-eval's task has it and `acc` otherwise (BoolQ, WinoGrande),
as RoLoRA and QuaRot average; `chance` is what guessing gives on the same rows. OUT.json is written after each folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from slimtune.evaluate.tasks import SUFFIXES, local_task, tasks
from slimtune.recipe.run import environment
from slimtune.recipe.shell import open_model

SPLIT = ".test"
PLAIN = ("boolq", "winogrande")
"""Tasks whose answers have no lengths to normalise by."""


SCORES = "acc_norm", "acc"
"""What counts of a task, the first that it has: MMLU's letters are all as long."""


def test_files(data: Path) -> list[Path]:
    """The test sets in a folder."""
    return sorted(path for path in data.iterdir() if any(path.name.endswith(SPLIT + end) for end in SUFFIXES))


def chance(files: Sequence[Path], limit: int) -> float:
    """The average score of guessing on the same rows."""
    sets = [local_task(file)["custom_dataset"]()["test"].to_list()[: limit if limit > 0 else None] for file in files]
    return fmean(fmean(1 / len(row.get("choices") or row["contexts"]) for row in rows) for rows in sets)


def measure(folder: str, files: Sequence[Path], limit: int, dtype: str) -> dict[str, Any]:
    """The scores of one folder."""
    start = time.process_time()
    loaded, model = open_model(folder, dtype=dtype)
    found: dict[str, dict[str, Any]] = {}
    for row in tasks(model, loaded.tokenizer, [str(f) for f in files], limit=limit if limit > 0 else None):  # type: ignore[arg-type]
        task = found.setdefault(row.task.removesuffix(SPLIT), {"samples": row.samples})
        task |= {row.metric: row.value, f"{row.metric}_stderr": row.stderr}
    average = fmean(
        task["acc" if name in PLAIN else next(m for m in SCORES if m in task)] for name, task in found.items()
    )
    return {"average": average, "cpu_seconds": round(time.process_time() - start, 1), "tasks": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Score every folder, and write the JSON result after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="NAME=FOLDER, or a folder, which is called by its last part")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="rows of a task; -1: all")
    parser.add_argument("--dtype", default="", help="default: a run's own, or float32")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    files = test_files(args.data)
    if not files:
        sys.exit(f"no test sets in {args.data}: wanted files like piqa{SPLIT}.json.gz")
    rows = []
    for given in args.folders:
        name, sign, folder = given.partition("=")
        folder = folder if sign else given
        rows.append({"name": name if sign else Path(folder).name, **measure(folder, files, args.limit, args.dtype)})
        print(f"{rows[-1]['name']:32} {rows[-1]['average']:.4f}", flush=True)
        facts = {"limit": args.limit, "chance": chance(files, args.limit), "rows": rows}
        args.output.write_text(json.dumps({"environment": environment(), **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
