"""Perplexity of SmolLM2-135M with 20 and 50 % of its blocks' parameters really removed, at once.

Every arm prunes the same float32 model by scores from the same calibration windows (C4, 512 tokens each), without
training, some with what is kept fitted; one evaluator scores all of them: token perplexity on the first `--tokens`
tokens of each text, over windows of each of `--lengths` (`measured`; `perplexity` is that of the first of both).

    python benchmarks/prune_smollm2.py --calibration c4.jsonl.gz --text wiki.test.raw.gz ptb.test.txt.gz
    python benchmarks/prune_smollm2.py ... --targets layers --criteria influence loss-change gate-fisher --resume
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from slimtune.arch import bind
from slimtune.calib.data import calibration_tokens, text_tokens
from slimtune.calib.rows import DataSource, read_rows, read_text
from slimtune.evaluate.perplexity import perplexity
from slimtune.export.load import load
from slimtune.kernels.precision import fast_forward
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune import IMPORTANCES
from slimtune.prune.biases import give_biases_
from slimtune.prune.collect import collect
from slimtune.prune.groups import axes, parameters
from slimtune.prune.probe import Scores
from slimtune.prune.refit import refit_
from slimtune.prune.removal import MEASURED
from slimtune.prune.select import select
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.recipe.run import environment

RESULT = Path(__file__).parent / "results" / "prune_smollm2.json"


def scores_of(model: Any, targets: Any, name: str, tokens: torch.Tensor) -> Scores:
    """The scores of a criterion as it is published: LoRAPrune's normalised in each weight."""
    model = add_lora(model, r=8) if name.startswith("lora") else model
    modelmap = bind(model)
    normalise: Any = "module" if name.startswith("lora") else "none"
    found = axes(modelmap, targets)
    return collect(base_of(model), modelmap, found, IMPORTANCES[name](), tokens, normalise=normalise)


def measured(model: Any, texts: dict[str, torch.Tensor], lengths: list[int]) -> dict[str, float]:
    """Perplexity by text and length, computed alike for every arm."""
    with fast_forward(torch.device("cpu"), torch.float32):
        return {
            f"{name} {length}": perplexity(model, tokens, length=length).value
            for name, tokens in texts.items()
            for length in lengths
        }


def main() -> None:
    """Run every arm and write benchmarks/results/prune_smollm2.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="", help="rows of text; default: the built-in pydocs")
    parser.add_argument("--text", nargs="+", required=True, help="raw texts to score")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512], help="of windows")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument(
        "--criteria", nargs="+", default=[name for name in IMPORTANCES if not IMPORTANCES[name].needs & MEASURED]
    )
    parser.add_argument("--refit", nargs="+", default=["wanda", "flap", "gate-fisher"], help="criteria to refit, too")
    parser.add_argument("--bias", nargs="*", default=["flap"], help="criteria to give biases, too, fitted or not")
    parser.add_argument("--targets", default="kv+ffn", help="kinds of units, joined by +")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the result has")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    source = DataSource(path=arguments.calibration) if arguments.calibration else DataSource(builtin="pydocs")
    windows = calibration_tokens(read_rows(source), loaded.tokenizer, arguments.samples, 512, seed=0)
    texts = {
        Path(path).name: text_tokens(read_text(path), loaded.tokenizer)[: arguments.tokens] for path in arguments.text
    }
    if arguments.resume:
        facts = json.loads(arguments.output.read_text())
    else:
        facts = {
            "environment": environment(),
            "model": Path(arguments.model).name,
            "seed": 0,
            "calibration": Path(str(source)).name,
            "samples": arguments.samples,
            "text": list(texts),
            "lengths": arguments.lengths,
            "tokens": {name: len(tokens) for name, tokens in texts.items()},
            "dense": measured(loaded.model, texts, arguments.lengths),
            "rows": [],
        }
        print("dense", facts["dense"], flush=True)
    for name in arguments.criteria:
        fits = (False, True) if name in arguments.refit else (False,)
        biases = (False, True) if name in arguments.bias else (False,)
        wanted = list(product(arguments.ratios, fits, biases))
        held = [(r["importance"], r["targets"], r["ratio"], r["refit"], r.get("bias", False)) for r in facts["rows"]]
        wanted = [one for one in wanted if (name, arguments.targets, *one) not in held]
        if not wanted:
            continue
        start = time.process_time()
        targets = arguments.targets.split("+")
        scores = scores_of(load(arguments.model).model, targets, name, windows)
        seconds = time.process_time() - start
        for ratio, fit, bias in wanted:
            row = {"importance": name, "targets": arguments.targets, "refit": fit, "bias": bias, "ratio": ratio}
            model = load(arguments.model).model
            row |= arm(model, targets, name, scores, ratio, windows, fit=fit, bias=bias)
            found = measured(model, texts, arguments.lengths)
            row |= {"perplexity": next(iter(found.values())), "measured": found}
            facts["rows"].append({**row, "score_cpu_seconds": round(seconds, 1)})
            arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
            print(row, flush=True)


def arm(
    model: Any, targets: Any, name: str, scores: Scores, ratio: float, windows: torch.Tensor, *, fit: bool, bias: bool
) -> dict[str, Any]:
    """Prune `model` by `scores`, with what is kept fitted, or biases for what goes, or both."""
    modelmap = bind(model)
    if bias:
        give_biases_(model, modelmap, axes(modelmap, targets))
        modelmap = bind(model)
    found = axes(modelmap, targets)
    kept = select(modelmap, found, scores, ratio * parameters(modelmap, "blocks"), additive=IMPORTANCES[name].additive)
    plan = PrunePlan(found, kept, ratio)
    if fit or bias:
        refit_(model, modelmap, plan, windows, fit=fit)
    pruned = prune_(model, modelmap, plan)
    return {
        "removed_ratio": pruned.removed_ratio,
        "kept": {fact.kind: fact.kept for fact in pruned.axes},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


if __name__ == "__main__":
    main()
