"""Half of the parameters of all blocks gone, with the same training: SmolLM2-135M, C4, WikiText-2 for perplexity.

    taylor     pruned at once by weight-taylor (LLM-Pruner), then LoRA
    loraprune  pruned along LoRA by LoRAPrune's importance, normalised by module
    wanda      pruned at once by wanda, fitted by least squares, then LoRA
    gate       pruned along LoRA by gate-fisher, taught by the unpruned model

Every arm is a recipe with the same rows, rate and number of steps. An arm whose run folder is whole is not run again.

    python benchmarks/prune_gradual_smollm2.py --train c4.jsonl.gz --text wiki.test.raw.gz --work DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import slimtune
from slimtune.recipe.run import environment

RESULTS = Path(__file__).parent / "results"


def arms(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The steps of each arm."""
    lora = {"lora": {"r": 16, "lora_alpha": 32}}
    options = {
        "max_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "max_length": arguments.length,
        "per_device_train_batch_size": 4,
        "completion_only_loss": False,
    }
    train, taught = {"train": options}, {"train": {**options, "distill": True}}
    end = [
        {"merge": {}},
        {"evaluate": {"perplexity": {"wikitext2": arguments.text}, "max_tokens": arguments.tokens, "speed": True}},
    ]
    cut = {"ratio": arguments.ratio, "multiple_of": 8, "targets": ["ffn"]}
    ramp = {**cut, "schedule": "cubic", "every": 2}
    lora_paper = {"importance": "lora", "normalise": "module"}
    return {
        "taylor": [{"prune": {**cut, "importance": "weight-taylor"}}, lora, train, *end],
        "loraprune": [lora, {"prune": {**ramp, **lora_paper}}, train, *end],
        "wanda": [{"prune": {**cut, "importance": "wanda", "refit": True}}, lora, train, *end],
        "gate": [lora, {"prune": {**ramp, "importance": "gate-fisher"}}, taught, *end],
    }


def main() -> None:
    """Parse the command line, run the arms, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["taylor", "loraprune", "wanda", "gate"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    settings = {
        key: getattr(arguments, key) for key in ("ratio", "steps", "learning_rate", "length", "tokens", "samples")
    }
    rows = []
    for name in arguments.arms:
        folder = arguments.work / name
        data = {
            "train": {"path": arguments.train},
            "calibration": {"path": arguments.train, "samples": arguments.samples, "length": 512},
        }
        recipe = {
            "model": arguments.model, "seed": 0, "dtype": "float32", "data": data, "steps": arms(arguments)[name]
        }  # fmt: skip
        report = slimtune.run(recipe, folder, resume=folder.is_dir())
        values = {m["name"]: m["value"] for m in report["metrics"]}
        parameters = report["model"]["parameters"]
        seconds = sum(step["seconds"] for step in report["steps"])
        rows.append({"arm": name, "parameters": parameters, "seconds": seconds, **values})
        print(f"{name:10} {parameters:,} parameters, perplexity {values['wikitext2_perplexity']:,.2f}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        head = {"environment": environment(), "model": Path(arguments.model).name, "seed": 0, "window": 512}
        (RESULTS / "prune_gradual_smollm2.json").write_text(
            json.dumps({**head, **settings, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
