"""WikiText-2 perplexity of SmolLM2-135M with weights and inputs in few bits, rotated or not.

Every setting quantizes the float32 model anew: weights per channel and symmetric, inputs per token and dynamic, by
round-to-nearest and by OPTQ on 32 calibration windows of 512 tokens. Token perplexity over windows of 512 on the first
16,384 tokens of the raw test split.

    python benchmarks/w4a4_smollm2.py --calibration c4.jsonl.gz --text wiki.test.raw.gz [--rotated FOLDER]

`--rotated` is the same model with rotations folded into its weights: its rows stand beside the plain ones.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import slimtune
from slimtune.calib.data import calibration_tokens, text_tokens
from slimtune.calib.rows import DataSource, read_rows, read_text
from slimtune.evaluate.perplexity import perplexity
from slimtune.kernels.precision import fast_forward
from slimtune.recipe.run import environment

RESULTS = Path(__file__).parent / "results"
CHANNEL = {"group_size": -1, "sym": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {**CHANNEL, "bits": 8, "activations": {"bits": 8}},
    "W6A6": {**CHANNEL, "bits": 6, "activations": {"bits": 6}},
    "W4A16": {**CHANNEL, "bits": 4},
    "W4A8": {**CHANNEL, "bits": 4, "activations": {"bits": 8}},
    "W4A4": {**CHANNEL, "bits": 4, "activations": {"bits": 4}},
    "W4A4 clipped": {**CHANNEL, "bits": 4, "activations": {"bits": 4, "search": True}},
    "W4A4 asymmetric": {**CHANNEL, "bits": 4, "activations": {"bits": 4, "sym": False}},
    "W4A4 asymmetric clipped": {**CHANNEL, "bits": 4, "activations": {"bits": 4, "sym": False, "search": True}},
    "W4A4 down W8A8": {
        **CHANNEL,
        "bits": 4,
        "activations": {"bits": 4},
        "layers": {"down_proj": {"bits": 8, "activations": {"bits": 8}}},
    },
    "W4A4 groups of 64": {"sym": True, "group_size": 64, "bits": 4, "activations": {"bits": 4, "group_size": 64}},
}


def main() -> None:
    """Measure what was asked, writing after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rotated", default="", help="a folder with the same model, rotated")
    parser.add_argument("--calibration", default="", help="rows of text; default: the built-in pydocs")
    parser.add_argument("--text", default="", help="a raw text to score; default: pydocs' held-out part")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=["rtn", "optq"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--output", type=Path, default=RESULTS / "w4a4_smollm2.json")
    arguments = parser.parse_args()
    model, tokenizer = slimtune.load(arguments.model)
    source = DataSource(path=arguments.calibration) if arguments.calibration else DataSource(builtin="pydocs")
    windows = calibration_tokens(read_rows(source), tokenizer, arguments.samples, 512, seed=0)
    text = read_text(arguments.text) if arguments.text else "\n".join(map(str, read_rows(DataSource(builtin="pydocs"))))
    tokens = text_tokens(text, tokenizer)[: arguments.tokens]
    result: dict[str, Any] = {
        "environment": environment(),
        "model": Path(arguments.model).name,
        "calibration": {"source": Path(str(source)).name, "windows": len(windows), "length": 512, "seed": 0},
        "text": Path(arguments.text).name,
        "tokens": len(tokens),
        "rows": [],
    }
    for base, name in (("plain", arguments.model), ("rotated", arguments.rotated)):
        for setting in ("16 bit", *arguments.settings) if name else ():
            for method in ["none"] if setting == "16 bit" else arguments.methods:
                clock = time.perf_counter()
                model, _ = slimtune.load(name)
                facts: list[Any] = []
                if method != "none":
                    slimtune.quantize(model, method, calibration=windows, facts=facts.append, **SETTINGS[setting])
                seconds = time.perf_counter() - clock
                with fast_forward(torch.device("cpu"), torch.float32):
                    value = perplexity(model, tokens, length=512).value
                bits = round(facts[0].bits_per_weight, 3) if facts else 32
                row = {"base": base, "setting": setting, "method": method, "perplexity": round(value, 3), "bits": bits}
                result["rows"].append({**row, "seconds": round(seconds, 1)})
                print(row, flush=True)
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
