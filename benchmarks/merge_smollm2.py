"""What merging an adapter into packed weights costs: SmolLM2-135M, quantized, trained, merged.

    python benchmarks/merge_smollm2.py [--arms optq-4 optq-3 nf4] [--steps 50]

The base is quantized on 32 windows of the built-in pydocs, an adapter of rank 8 trained on pydocs, and the result is
merged in three ways: into 16 bit (which loses nothing but the bits), into the packed weights it has (`merge:
{keep_bits: true}`), and into 16 bit and then quantized anew by the same quantizer, as one does without such a merge.
Perplexities are of pydocs' held-out part. Every arm adds its row to the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import slimtune
from slimtune.calib.data import calibration_tokens
from slimtune.calib.rows import DataSource, read_rows
from slimtune.recipe.run import environment

RESULT = Path(__file__).parent / "results" / "merge_smollm2.json"
OPTIONS: dict[str, dict[str, Any]] = {"optq": {"group_size": 64}, "rtn": {"group_size": 64}}


def run(model_name: str, arm: str, steps: int, held_out: int) -> dict[str, Any]:
    """One quantizer: what every way leaves."""
    method, _, bits = arm.partition("-")
    options = {**OPTIONS.get(method, {}), **({"bits": int(bits)} if bits else {})}
    model, tokenizer = slimtune.load(model_name)
    source = DataSource(builtin="pydocs", samples=32)
    windows = calibration_tokens(read_rows(source), tokenizer, samples=32, length=512)
    text = {"pydocs": {"builtin": "pydocs", "split": "test"}}

    def score(model: Any) -> float:
        found = slimtune.evaluate(model, tokenizer, perplexity=text, max_tokens=held_out)
        return next(float(one["value"]) for one in found if one["name"] == "pydocs_perplexity")

    row: dict[str, Any] = {"arm": arm, "dense": score(model)}
    model = slimtune.quantize(model, method, tokenizer=tokenizer, calibration=windows, **options)
    row["quantized"] = score(model)
    model = slimtune.add_lora(model, r=8)
    slimtune.finetune(model, tokenizer, DataSource(builtin="pydocs"), max_steps=steps, max_length=256)
    row["adapter"] = score(model)
    print(row, flush=True)
    anew = slimtune.merge(copy.deepcopy(model))
    row["merged, 16 bit"] = score(anew)
    start = time.process_time()
    anew = slimtune.quantize(anew, method, tokenizer=tokenizer, calibration=windows, **options)
    row["anew_cpu_seconds"] = round(time.process_time() - start, 1)
    row["quantized anew"] = score(anew)
    facts: list[dict[str, Any]] = []
    start = time.process_time()
    kept = slimtune.merge(model, keep_bits=True, calibration=windows, force=True, facts=facts.append)
    row["keep_bits_cpu_seconds"] = round(time.process_time() - start, 1)  # perplexity before and after included
    row["keep_bits"] = score(kept)
    return {**row, "cost_on_calibration": facts[0]["cost"], "bits_per_weight": facts[0]["bits_per_weight"]}


def main() -> None:
    """Run the arms, and add their rows to the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--arms", nargs="+", default=["optq-4", "optq-3", "nf4"], help="quantizers and their bits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=8192)
    a = parser.parse_args()
    for arm in a.arms:
        row = {"steps": a.steps, "tokens": a.tokens, **run(a.model, arm, a.steps, a.tokens)}
        print(row, flush=True)
        before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
        rows = [one for one in before if (one["arm"], one["steps"]) != (arm, a.steps)] + [row]
        RESULT.write_text(json.dumps({"environment": environment(), "seed": 0, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
