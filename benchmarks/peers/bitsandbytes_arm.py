"""bitsandbytes as one arm of the weight-quantization benchmark: NF4 with double-quantized scales, or LLM.int8.

Runs in bitsandbytes' own virtual environment (see README.md beside this file), never in slimtune's:

    python bitsandbytes_arm.py --model DIR --bits 8 --output OUT

quantizes every decoder-block linear of the float32 model DIR and writes OUT as a plain float32 Hugging Face folder that
holds the *dequantized* weights, beside OUT/result.json with what it cost. LLM.int8 rounds inputs as well (rows, without
their outliers), which a folder of weights does not say. `--tokens`, `--samples` and `--group-size` are taken so
that one driver calls every arm alike.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel_arm import Meter, Weights, write_folder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    """Quantize, write the folder, then result.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**(four if args.bits == 4 else {"load_in_8bit": True}))
    with Meter() as meter:
        peer = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, device_map="cpu")
    weights = dequantized(peer)
    write_folder(args.model, weights, args.output)
    result = {
        "method": "bitsandbytes",
        "versions": {name: version(name) for name in ("bitsandbytes", "torch", "transformers")},
        "bits": args.bits,
        "samples": 0,
        **meter.facts(),
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def dequantized(peer: torch.nn.Module) -> Weights:
    """Every quantized linear's weight (out, in)."""
    import bitsandbytes as bnb

    found: Weights = {}
    for name, module in peer.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear8bitLt):
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            found[name] = weight.data.float() * scale.float()[:, None] / 127
        elif isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return found


if __name__ == "__main__":
    main()
