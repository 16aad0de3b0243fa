r"""What low bits cost after fine-tuning: the same LoRA run on the base that every quantizer left behind.

Takes the folders of weights that `quantize_smollm2.py --work DIR` wrote (each quantizer's result, decoded), trains the
same adapter on each with the same rows, and scores held-out rows before and after: their loss, and with `--rouge N`
the ROUGE of greedy replies to the first N of them. Training on decoded weights and on
packed ones is the same arithmetic (tests/unit/test_fused.py); only speed and memory differ, which `train_step.py`
measures. `nf4` stands for QLoRA's base: its weights are those of bitsandbytes (docs/LOG.md).

An arm with `+residual` quantizes here (with `--windows DIR/tokens128.safetensors`, which `--timing` left there), and
its factors, of the same rank, start from what that lost; with `+scales` the scales and signs of the packed layers
train, too: `slimtune-quip-b2+residual+scales`; with `+gptaq` weights make up for a quarter of the inputs' drift. Of
several `--learning-rate`s or seeds every arm is trained at each, and the result is called so.

    python benchmarks/finetune_smollm2.py --rows alpaca.jsonl.gz --name alpaca --work DIR [--arms NAME ...]
    python benchmarks/finetune_smollm2.py --rows samsum.jsonl.gz --name samsum --work DIR --rouge 64 \\
        --columns 'prompt=Summarize this conversation:\n{dialogue}' 'completion={summary}'
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slimtune import quantize
from slimtune.calib.formats import normalise
from slimtune.calib.rows import DataSource, read_rows
from slimtune.evaluate.rouge import rouge
from slimtune.export.load import Loaded, load
from slimtune.lora.attach import add_lora
from slimtune.recipe.run import environment
from slimtune.train.data import Collator, padding_id, tokenize
from slimtune.train.loop import finetune
from slimtune.train.options import TrainOptions

RANK = 16
RATE = 5e-4
RESULTS = Path(__file__).parent / "results"
ARMS = (
    "16bit", "slimtune-nf4-b4-g64", "gptqmodel-mse-b4-g64", "gptqmodel-mse-b3-g64", "gptqmodel-mse-b2-g64",
    "hqq-axis-0-b4-g64", "hqq-axis-0-b3-g64", "slimtune-optq-b4-g64", "slimtune-optq-b3-g64", "slimtune-quip-b3-g64",
    "slimtune-optq-b2-g64", "slimtune-quip-b2-g64", "slimtune-trellis-b2-g64", "slimtune-trellis-b3-g64",
)  # fmt: skip


def packed(name: str, arguments: argparse.Namespace) -> Loaded:
    """The model, quantized here as the name of the arm says: `slimtune-METHOD-bBITS[-gGROUP]+...`."""
    loaded = load(arguments.model, dtype="bfloat16")
    _, method, bits, *group = name.partition("+")[0].split("-")
    fields: dict[str, Any] = {"bits": int(bits[1:]), **({"group_size": int(group[0][1:])} if group else {})}
    if "+gptaq" in name:
        fields |= {"gptaq": 0.25}
    windows = load_file(arguments.windows)["tokens"]
    quantize(loaded.model, method, **fields, calibration=windows, residual_rank=RANK if "+residual" in name else 0)
    return loaded


def arm(name: str, loaded: Loaded, rows: list[Any], arguments: argparse.Namespace, rate: float, seed: int) -> Any:
    """Train on the base; its losses."""
    conversations = normalise(rows, where="rows")
    examples, _ = tokenize(conversations, loaded.tokenizer, arguments.length, completion_only_loss=True, where="rows")
    held_out, examples = examples[: arguments.held_out], examples[arguments.held_out :]
    init = "residual" if "+residual" in name else "default"
    model = add_lora(loaded.model, r=RANK, lora_alpha=2 * RANK, init=init, seed=seed)
    options = TrainOptions(
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=rate,
        max_length=arguments.length,
        scales="+scales" in name,
    )
    result = finetune(model, examples, Collator(padding_id(loaded.tokenizer)), options, held_out=held_out, seed=seed)
    facts = result.to_dict()
    kept = {key: facts[key] for key in ("eval_loss_before", "eval_loss_after", "steps", "tokens")}
    if arguments.rouge:
        scored = conversations[: arguments.rouge]  # of those held out
        kept |= rouge(model, loaded.tokenizer, scored, max_new_tokens=64)  # type: ignore[arg-type]
    return kept


def main() -> None:
    """Parse the command line, train every arm that has a folder, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[RATE])
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rouge", type=int, default=0, help="held-out rows to reply to")
    parser.add_argument("--windows", help="safetensors with calibration windows, for arms that quantize here")
    parser.add_argument("--columns", nargs="*", default=[], metavar="NAME=TEXT", help="as `columns` of a data source")
    arguments = parser.parse_args()
    columns = dict(pair.replace("\\n", "\n").split("=", 1) for pair in arguments.columns)
    rows = list(read_rows(DataSource(path=arguments.rows, columns=columns))[: arguments.held_out + 4 * arguments.steps])
    settings = {key: getattr(arguments, key) for key in ("steps", "length", "learning_rate", "held_out", "rouge")}
    found = []
    for name in arguments.arms:
        folder = arguments.model if name == "16bit" else str(arguments.work / name)
        if name != "16bit" and "+" not in name and not (arguments.work / name / "result.json").is_file():
            print(f"left out: {name} (no folder)")
            continue
        base: Loaded | None = None
        for rate, seed in product(arguments.learning_rate, range(arguments.seeds)):
            ending = f"{arguments.steps}.{arguments.rouge}.{seed}" + f".{rate}" * (rate != RATE)
            kept = arguments.work / f"{name}.{arguments.name}.{ending}.json"
            if not kept.is_file():
                if base is None:
                    base = packed(name, arguments) if "+" in name else load(folder, dtype="bfloat16")
                kept.write_text(json.dumps(arm(name, deepcopy(base), rows, arguments, rate, seed)))
            facts = json.loads(kept.read_text())
            found.append({"arm": name, "learning_rate": rate, "seed": seed, **facts})
            print(f"{name:28} {rate} {facts['eval_loss_before']:.4f} -> {facts['eval_loss_after']:.4f}", flush=True)
    head = {"environment": environment(), "model": Path(arguments.model).name, "data": Path(arguments.rows).name}
    RESULTS.mkdir(exist_ok=True)
    ending = "_rates" * (len(arguments.learning_rate) > 1) + "_seeds" * (arguments.seeds > 1)
    (RESULTS / f"finetune_smollm2_{arguments.name}{ending}.json").write_text(
        json.dumps({**head, "threads": torch.get_num_threads(), **settings, "rows": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
