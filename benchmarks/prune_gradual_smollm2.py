"""Half of the parameters of all blocks gone, with the same training: SmolLM2-135M, C4, perplexity and tasks.

    taylor     pruned at once by weight-taylor (LLM-Pruner), then LoRA
    loraprune  pruned along LoRA by LoRAPrune's importance, normalised by module
    flap       pruned at once by flap, then LoRA
    wanda      pruned at once by wanda, fitted by least squares, then LoRA
    wanda-only the same without the fit
    loraprune-half  LoRAPrune's importance again, with the ramp over after half of the steps
    loraprune-fit   the same importance, with such a short ramp, fitted at every choice
    depth      whole layers, at once, by the loss without them, then LoRA
    gate       pruned along LoRA by gate-fisher, taught by the unpruned model
    gate-fit   the same, fitted at every choice
    wanda-fit  pruned along LoRA by wanda, fitted at every choice, taught by the unpruned model
    wanda-early  the same, with the ramp over after a fifth of the steps, in six choices or so
    top-k      gate-fit, taught by what the unpruned model said once (32 likeliest tokens)

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
    texts = {"wikitext2": arguments.text, **({"ptb": arguments.ptb} if arguments.ptb else {})}
    score: dict[str, Any] = {"max_tokens": arguments.tokens}
    end: list[dict[str, Any]] = [{"merge": {}}]
    for length in arguments.windows:
        named = {name if length == 512 else f"{name}_{length}": text for name, text in texts.items()}
        end.append({"evaluate": {"perplexity": named, "length": length, **score}})
    tasks = {"tasks": arguments.tasks, "limit": arguments.limit} if arguments.tasks else {}
    end.append({"evaluate": {"speed": True, **tasks}})
    cut = {"ratio": arguments.ratio, "multiple_of": 8, "targets": arguments.targets.split("+")}
    ramp = {**cut, "schedule": "cubic", "every": arguments.every}
    fisher, wanda = {"importance": "gate-fisher"}, {"importance": "wanda"}
    top_k = {"train": {**options, "distill": True, "distill_top_k": 32}}
    early = {"warmup": 0.0, "cooldown": 0.8, "every": max(arguments.every, arguments.steps // 30)}
    depth = {**cut, "targets": ["layers"], "importance": "loss-change"}
    lora_paper = {"importance": "lora", "normalise": "module"}
    return {
        "taylor": [{"prune": {**cut, "importance": "weight-taylor"}}, lora, train, *end],
        "loraprune": [lora, {"prune": {**ramp, **lora_paper}}, train, *end],
        "wanda": [{"prune": {**cut, **wanda, "refit": True}}, lora, train, *end],
        "wanda-only": [{"prune": {**cut, **wanda}}, lora, train, *end],
        "loraprune-half": [lora, {"prune": {**ramp, **lora_paper, "warmup": 0.0, "cooldown": 0.5}}, train, *end],
        "loraprune-fit": [lora, {"prune": {**ramp, **lora_paper, **early, "refit": True}}, train, *end],
        "flap": [{"prune": {**cut, "importance": "flap"}}, lora, train, *end],
        "depth": [{"prune": depth}, lora, train, *end],
        "gate": [lora, {"prune": {**ramp, **fisher}}, taught, *end],
        "gate-fit": [lora, {"prune": {**ramp, **fisher, "refit": True}}, taught, *end],
        "wanda-fit": [lora, {"prune": {**ramp, **wanda, "refit": True}}, taught, *end],
        "wanda-early": [lora, {"prune": {**ramp, **wanda, **early, "refit": True}}, taught, *end],
        "top-k": [lora, {"prune": {**ramp, **fisher, "refit": True}}, top_k, *end],
    }


def main() -> None:
    """Parse the command line, run the arms, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--ptb", default="", help="a second text")
    parser.add_argument("--windows", type=int, nargs="+", default=[512], help="lengths of perplexity windows")
    parser.add_argument("--tasks", nargs="*", default=[], help="files of multiple-choice rows, or lm-eval's names")
    parser.add_argument("--limit", type=int, default=200, help="items of a task")
    parser.add_argument("--targets", default="ffn", help="kinds of units, joined by +")
    parser.add_argument("--every", type=int, default=2, help="training steps between choices")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "prune_gradual_smollm2.json")
    parser.add_argument("--arms", nargs="+", default=["taylor", "loraprune", "wanda", "gate", "gate-fit"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    keys = (
        "ratio",
        "targets",
        "every",
        "steps",
        "learning_rate",
        "length",
        "tokens",
        "samples",
        "limit",
        "seed",
        "dtype",
    )
    settings = {key: getattr(arguments, key) for key in keys}
    rows = []
    for name in arguments.arms:
        folder = arguments.work / name
        data = {
            "train": {"path": arguments.train},
            "calibration": {"path": arguments.train, "samples": arguments.samples, "length": 512},
        }
        recipe = {
            "model": arguments.model, "seed": arguments.seed, "dtype": arguments.dtype, "data": data,
            "steps": arms(arguments)[name],
        }  # fmt: skip
        report = slimtune.run(recipe, folder, resume=folder.is_dir())
        values = {m["name"]: m["value"] for m in report["metrics"]}
        parameters = report["model"]["parameters"]
        seconds = sum(step["seconds"] for step in report["steps"])
        rows.append({"arm": name, "parameters": parameters, "seconds": seconds, **values})
        told = ", ".join(f"{key} {value:,.2f}" for key, value in values.items() if key.endswith("perplexity"))
        print(f"{name:10} {parameters:,} parameters, {told}", flush=True)
        head = {"environment": environment(), "model": Path(arguments.model).name}
        arguments.output.write_text(json.dumps({**head, **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
