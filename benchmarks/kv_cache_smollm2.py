"""What a cache of keys and values in few bits costs SmolLM2-135M, as it is, rotated, and with R3.

    python benchmarks/kv_cache_smollm2.py --model DIR --text wiki.test.raw.gz

Perplexity of the first tokens of WikiText-2; weights and activations stay in float32, so the cache is all that is lost.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import slimtune
from slimtune.calib.data import text_tokens
from slimtune.calib.rows import read_text
from slimtune.evaluate.perplexity import perplexity
from slimtune.recipe.run import environment

RESULT = Path(__file__).parent / "results" / "kv_cache_smollm2.json"
TOKENS, LENGTH = 4096, 512
ARMS: dict[str, dict[str, Any] | None] = {"as it is": None, "rotated": {}, "rotated, r3": {"online": ["r3"]}}


def main() -> None:
    """Measure every arm at every width, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args()
    from slimtune.hub import round_cache_

    found = []
    for arm, rotation in ARMS.items():
        model, tokenizer = slimtune.load(args.model)
        if rotation is not None:
            slimtune.rotate(model, **rotation)
        tokens = text_tokens(read_text(args.text), tokenizer)[: args.tokens]
        for bits in (16, 8, 4, 3):
            round_cache_(model, bits)
            with torch.no_grad():
                value = perplexity(model, tokens, length=LENGTH).value
            found.append({"arm": arm, "bits": bits, "perplexity": value})
            print(f"{arm:12} {bits:3} bits {value:9.3f}", flush=True)
    facts = {"environment": environment(), "tokens": args.tokens, "length": LENGTH, "rows": found}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
