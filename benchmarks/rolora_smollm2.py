r"""RoLoRA and the controls its paper lacks: SmolLM2-135M, WikiText-2, one quantizer for all.

    a  LoRA, merged, 16 bit              d  LoRA, merged, rotated, quantized
    b  LoRA, merged, quantized           e  rotated, LoRA, merged, quantized (RoLoRA)
    c  rotated, quantized, not tuned     f  rotated, LoRA trained on rounded weights and inputs, merged, quantized
                                         g  as f, with rounded inputs alone
    h  rotated, quantized, LoRA on the packed weights, merged into them (`keep_bits`)
    i  rotated, quantized, LoRA that starts from what was lost, trained with the scales, beside the packed weights
    j  as g for two thirds of the steps, then LoRA from what was lost for the rest, beside the packed weights

Every arm is a recipe; all train the same rows with the same seed, and b and d start from what a left. An arm whose run
folder is whole is not run again.

`--balance` with `--online inputs r4 heads` is slimtune's own way to W4A4: channels are scaled, and inputs turned where
they are read, instead of R1.

    python benchmarks/rolora_smollm2.py --train wiki.valid.raw.gz --text wiki.test.raw.gz \\
        --calibration c4.jsonl.gz --work DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import slimtune
from slimtune.recipe.run import environment

RESULTS = Path(__file__).parent / "results"
RATE = 2e-4
STEPS = 60


def arms(arguments: argparse.Namespace, work: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """By letter: the model to start from, and the steps."""
    bits = arguments.bits
    tuned = str(work / "a" / "model")
    rotate = {"rotate": {"kind": arguments.kind, "online": arguments.online, "balance": arguments.balance}}
    lora = {"lora": {"r": 16, "lora_alpha": 32}}
    options = {
        "max_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "completion_only_loss": False,
    }
    clip = arguments.clip
    rounding = {"weights": bits, "activations": bits, "warmup_steps": arguments.steps // 4, "clip_ratio": clip}
    train = {"train": options}
    qat = {"train": {**options, "fake_quant": rounding}}
    inputs = {"train": {**options, "fake_quant": {**rounding, "weights": 16}}}
    quantize = {
        "quantize": {
            "method": arguments.method,
            "bits": bits,
            "group_size": -1,
            "sym": True,
            "activations": {"bits": bits, "search": clip < 1},
        }
    }
    early = arguments.steps * 2 // 3
    first = {"train": {**inputs["train"], "max_steps": early}}
    second = {"train": {**options, "max_steps": arguments.steps - early}}
    residual = {"lora": {"r": 16, "lora_alpha": 32, "init": "residual"}}
    scales = {"train": {**options, "scales": True}}
    low = {"merge": {"keep_bits": True, "force": True}}
    evaluate = {"evaluate": {"perplexity": {"wikitext2": arguments.text}, "max_tokens": arguments.tokens}}
    return {
        "a": (arguments.model, [lora, train, {"merge": {}}, evaluate]),
        "b": (tuned, [quantize, evaluate]),
        "c": (arguments.model, [rotate, quantize, evaluate]),
        "d": (tuned, [rotate, quantize, evaluate]),
        "e": (arguments.model, [rotate, lora, train, {"merge": {}}, quantize, evaluate]),
        "f": (arguments.model, [rotate, lora, qat, {"merge": {}}, quantize, evaluate]),
        "h": (arguments.model, [rotate, quantize, lora, train, evaluate, low, evaluate]),
        "i": (arguments.model, [rotate, quantize, residual, scales, evaluate]),
        "g": (arguments.model, [rotate, lora, inputs, {"merge": {}}, quantize, evaluate]),
        "j": (arguments.model, [rotate, lora, first, {"merge": {}}, quantize, residual, evaluate, second, evaluate]),
    }


def main() -> None:
    """Parse the command line, run the arms, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arms", default="abcdef")
    parser.add_argument("--method", default="optq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--kind", default="learned")
    parser.add_argument("--online", nargs="*", default=["r4", "heads"])
    parser.add_argument("--balance", action="store_true", help="scale channels before they turn")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clip", type=float, default=1.0, help="of inputs while training; below 1: searched afterwards"
    )
    arguments = parser.parse_args()
    kept = ("method", "bits", "kind", "online", "balance", "steps", "learning_rate", "tokens", "samples", "seed")
    settings = {key: getattr(arguments, key) for key in (*kept, "clip")}
    rows = []
    for letter in arguments.arms:
        model, steps = arms(arguments, arguments.work)[letter]
        folder = arguments.work / letter
        data = {
            "train": {"path": arguments.train, "samples": 2000},
            "calibration": {"path": arguments.calibration, "samples": arguments.samples, "length": 512},
        }
        recipe = {"model": model, "seed": arguments.seed, "dtype": "float32", "data": data, "steps": steps}
        report = slimtune.run(recipe, folder, resume=folder.is_dir())
        values = [m["value"] for m in report["metrics"] if m["name"] == "wikitext2_perplexity"]
        steps_taken = [step["step"] for step in report["steps"]]
        rows.append({"arm": letter, "steps": steps_taken, "perplexity": values[-1], "before": values[:-1]})
        print(f"{letter}  {' -> '.join(steps_taken):60} {values[-1]:,.2f}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        more = (f"_seed{arguments.seed}" if arguments.seed else "") + ("_clipped" if arguments.clip < 1 else "")
        more += "_balanced" if arguments.balance else ""
        more += f"_{arguments.learning_rate:g}" if arguments.learning_rate != RATE else ""
        more += f"_{arguments.steps}_steps" if arguments.steps != STEPS else ""
        name = f"rolora_smollm2_{arguments.method}_w{arguments.bits}a{arguments.bits}{more}.json"
        head = {"environment": environment(), "model": Path(arguments.model).name, "length": 512}
        (RESULTS / name).write_text(json.dumps({**head, **settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
