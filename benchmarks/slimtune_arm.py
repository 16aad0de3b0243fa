"""slimtune as one arm of the weight-quantization benchmark, with the same command line and measurements as the peers'.

    python slimtune_arm.py --model DIR --tokens T.safetensors --method optq --bits 4 --group-size 64 --output OUT

quantizes the float32 model DIR, streamed block by block, and writes OUT as a plain float32 folder of the *dequantized*
weights, beside OUT/result.json with what quantizing cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from gptqmodel_arm import Meter

from slimtune.arch import bind
from slimtune.export.load import load
from slimtune.export.native import write_model
from slimtune.quant import QUANTIZERS
from slimtune.quant.apply import all_linear, dequantize_, quantize_


def main() -> None:
    """Quantize once and write what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--method", default="optq")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further fields of the method, key=value")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    more = {k: json.loads(v) if v[0] in "tf0123456789" else v for k, v in (o.split("=") for o in arguments.options)}
    kind = QUANTIZERS[arguments.method]
    known = {field.name for field in fields(kind)}  # quip has no groups, nf4 one width
    asked = {"bits": arguments.bits, "group_size": arguments.group_size, "block_size": arguments.group_size}
    method = kind(**{key: value for key, value in asked.items() if key in known}, **more)
    tokens = load_file(arguments.tokens)["tokens"][: arguments.samples]
    meter = Meter()
    with meter:  # loading is inside: it is part of a streamed quantization
        loaded = load(arguments.model, lazy=True)
        facts = quantize_(
            loaded.model, bind(loaded.model), all_linear(method), tokens=tokens, materialise=loaded.materialise
        )
    loaded.materialise_()
    dequantize_(loaded.model, torch.float32)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_model(loaded.model, loaded.tokenizer, arguments.output)
    result = {
        "method": f"slimtune-{arguments.method}",
        "versions": {name: version(name) for name in ("slimtune", "torch", "transformers")},
        "settings": str(method),
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "samples": len(tokens),
        "length": tokens.shape[1],
        "stored_bits": facts.bits_per_weight,
        **meter.facts(),
    }
    (arguments.output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
