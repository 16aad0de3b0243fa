"""llm-compressor's rotations and GPTQ as arms of the W4A4 benchmark.

Runs in llm-compressor's own virtual environment (see README.md beside this file), never in slimtune's:

    python llmcompressor_arm.py --model DIR --tokens windows.safetensors --text text.safetensors --output result.json

Quantizes every linear but the head of the float32 model DIR to `--bits`: weights (a row one group, symmetric) and
inputs (per token, dynamic, symmetric), after the transforms named; and scores its own live model, which rounds what its
checkpoint would have an engine round. `tokens` are the calibration windows `[n, length]`, `text` one row of tokens;
perplexity is the exponential of the mean loss over windows of 512 tokens, as in slimtune.evaluate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from gptqmodel_arm import Meter
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TRANSFORMS: dict[str, Any] = {
    "none": list,
    "spinquant R1 R2": lambda: [SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")],
    "spinquant R1 R2 R4": lambda: [SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard")],
    "quip": lambda: [QuIPModifier(rotations=["v", "u"], transform_type="random-hadamard")],
}


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, length: int = 512) -> float:
    """Of `tokens` in windows that share nothing; the last, shorter window counts by its tokens."""
    total, count = 0.0, 0
    for window in tokens.split(length):
        if len(window) > 1:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count)


def run(arguments: argparse.Namespace, transform: str, method: str) -> dict[str, Any]:
    """One arm."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    windows = load_file(arguments.tokens)["tokens"][: arguments.samples]
    text = load_file(arguments.text)["tokens"].flatten()[: arguments.score]
    rounding = {"num_bits": arguments.bits, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**rounding, "strategy": "channel", "observer": "mse"},
        "input_activations": {**rounding, "strategy": "token", "dynamic": True, "observer": None},
    }
    modifier = {"optq": GPTQModifier, "rtn": QuantizationModifier}[method]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    begun = time.process_time()
    with Meter() as meter:
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=[*TRANSFORMS[transform](), modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(rows),
        )
    return {
        "transform": transform,
        "method": method,
        "bits": arguments.bits,
        "perplexity": perplexity(model, text),
        "process_seconds": round(time.process_time() - begun, 1),
        **meter.facts(),
    }


def main() -> None:
    """Run the arms asked for, writing after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--score", type=int, default=16_384)
    parser.add_argument("--transforms", nargs="+", default=list(TRANSFORMS), choices=list(TRANSFORMS))
    parser.add_argument("--methods", nargs="+", default=["rtn", "optq"])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    rows: list[dict[str, Any]] = []
    for transform in arguments.transforms:
        for method in arguments.methods:
            rows.append(run(arguments, transform, method))
            print(rows[-1], flush=True)
            head = {"versions": versions, "samples": arguments.samples, "score": arguments.score}
            arguments.output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
