"""How fast adapters learn from each start: SmolLM2-135M on Alpaca, GSM8K or SST-2, every arm at several rates.

An arm is a start, and a learning rate, and a seed. Each is trained for the same steps on the same batches in the same
order, and kept in a file of its own, so that the whole can be run in parts and continued. The table gives, for each
start, at its own best rate and at every rate that plain LoRA was run at too:

- `steps_to_plain`: the first step at which its smoothed training loss is where plain LoRA's ends, and the same for the
  held-out loss, which is measured every few steps;
- `auc`: the mean of the smoothed training loss over all steps;
- the last smoothed loss and the least held-out loss.

    python benchmarks/convergence_smollm2.py --data alpaca.jsonl.gz --cache DIR [--arms default,lora-ga] [--steps 150]
    python benchmarks/convergence_smollm2.py --data alpaca.jsonl.gz --cache DIR --table   # of what is there
    python benchmarks/convergence_smollm2.py --data gsm8k.jsonl.gz --cache DIR \
        --columns '{"prompt": "{question}", "completion": "{answer}"}'
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

import slimtune
from slimtune.arch import bind
from slimtune.calib.cpu import cpu_kernels
from slimtune.calib.formats import normalise
from slimtune.calib.loss import chunked_loss
from slimtune.calib.rows import DataSource, read_rows
from slimtune.lora.attach import base_of
from slimtune.lora.options import LoraOptions
from slimtune.quant import QUANTIZERS
from slimtune.recipe.gradients import attach_adapter, gradient_batches, gradients_of, wants_gradients
from slimtune.recipe.record import Curve
from slimtune.recipe.run import environment
from slimtune.train.data import Collator, Example, padding_id, tokenize

RESULT = Path(__file__).parent / "results" / "convergence_smollm2.json"
PEFT, FULL, PLAIN = "peft-lora-ga", "full", "default"
RS: dict[str, Any] = {"use_rslora": True}
STARTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "rslora": RS,
    "lora-ga": {**RS, "init": "lora-ga"},
    "lora-ga-stable": {**RS, "init": "lora-ga", "init_scale": "stable"},
    "lora-ga-0.02": {**RS, "init": "lora-ga", "init_target": 0.02},
    "lora-ga-0.1": {**RS, "init": "lora-ga", "init_target": 0.1},
    "lora-ga-0.3": {**RS, "init": "lora-ga", "init_target": 0.3},
    "lora-ga-ranks": {**RS, "init": "lora-ga", "ranks": "gradient"},
    "lora-ga-residual": {**RS, "init": "lora-ga", "init_residual": True},
    "gradient-a": {**RS, "init": "gradient-a"},
    "lora-one": {**RS, "init": "lora-one"},
    "lora-one-paper": {**RS, "init": "lora-one", "init_gamma": 128.0},
    "pissa": {**RS, "init": "pissa"},
    "eva": {**RS, "init": "eva"},
    "residual": {**RS, "init": "residual"},
    PEFT: RS,
    FULL: {},
}
USUAL = (PLAIN, "rslora", "lora-ga", "lora-ga-stable", "gradient-a", "lora-one", "pissa", "eva", PEFT, FULL)
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Setting:
    """What all arms of a table share."""

    data: str
    r: int
    steps: int
    batch: int
    length: int
    every: int
    held_out: int
    tokens: int
    dtype: str
    base: str


@dataclass(frozen=True)
class Arm:
    """One curve."""

    start: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.start}_{self.rate:g}_{self.seed}.json"


def examples_of(data: DataSource, tokenizer: Any, setting: Setting) -> tuple[list[Example], list[Example]]:
    """Training rows, and held-out ones, which are the last of the file."""
    rows = normalise(read_rows(data), where=str(data))
    count = 2 * setting.steps * setting.batch + 2000
    learn, _ = tokenize(rows[: min(count, len(rows) - 4 * setting.held_out)], tokenizer, setting.length)
    held, _ = tokenize(rows[-4 * setting.held_out :], tokenizer, setting.length)
    return learn, held[: setting.held_out]


def build(arm: Arm, setting: Setting, model: Any, learn: Sequence[Example], collate: Collator) -> tuple[Any, dict]:
    """The model of an arm before its first step, and what starting it cost."""
    begun = time.process_time()
    options = LoraOptions(r=setting.r, lora_alpha=2 * setting.r, init_tokens=setting.tokens, **STARTS[arm.start])
    batches = gradient_batches(learn, collate, options, setting.batch, arm.seed)
    facts: dict[str, Any] = {}
    if arm.start == FULL:
        model.requires_grad_(True)
    elif arm.start == PEFT:
        names = sorted({port.name.rsplit(".", 1)[-1] for port in bind(model).linears})
        config = LoraConfig(
            r=setting.r, lora_alpha=2 * setting.r, use_rslora=True, target_modules=names, init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
        )  # fmt: skip

        def step() -> None:
            for batch in batches:
                model(**batch, use_cache=False).loss.backward()

        preprocess_loraga(model, config, step)
        model = get_peft_model(model, config)
    else:
        gradients = gradients_of(model, batches, options, seed=arm.seed) if wants_gradients(options) else None
        model, facts = attach_adapter(model, options, gradients, batches, seed=arm.seed)
    ratios = [layer["ratio"] for layer in facts.get("layers", ())]
    return model, {
        "start_cpu_seconds": time.process_time() - begun,
        "ratio_median": statistics.median(ratios) if ratios else None,
        "gradients": facts.get("gradients"),
        "search": facts.get("search"),
    }


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    with chunked_loss(base_of(model)), cpu_kernels(base_of(model)):
        return model(**batch, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, held: Sequence[Example], collate: Collator, size: int) -> float:
    model.eval()
    total = count = 0.0
    for i in range(0, len(held), size):
        batch = collate(held[i : i + size])
        learnt = int((batch["labels"][:, 1:] >= 0).sum())
        total += float(loss_of(model, batch)) * learnt
        count += learnt
    model.train()
    return total / count


def train(arm: Arm, setting: Setting, data: DataSource, load: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """One curve: AdamW, a cosine after 5 % of warm-up, gradients clipped at 1."""
    model, tokenizer = load()
    learn, held = examples_of(data, tokenizer, setting)
    collate = Collator(padding_id(tokenizer))
    torch.manual_seed(arm.seed)
    model, facts = build(arm, setting, model, learn, collate)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arm.rate, weight_decay=0.0)
    warm = max(1, setting.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: (n + 1) / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / (setting.steps - warm))),
    )
    order = torch.randperm(len(learn), generator=torch.Generator().manual_seed(1000 + arm.seed)).tolist()
    losses: dict[int, float] = {}
    measured = {0: held_out_loss(model, held, collate, setting.batch)}
    begun = time.process_time()
    for step in range(1, setting.steps + 1):
        chosen = [learn[order[(step * setting.batch + i) % len(order)]] for i in range(setting.batch)]
        loss = loss_of(model, collate(chosen))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = float(loss)
        if not math.isfinite(losses[step]):
            break
        if step % setting.every == 0 or step == setting.steps:
            measured[step] = held_out_loss(model, held, collate, setting.batch)
            print(f"{arm.file}: step {step}, {losses[step]:.4f}, held out {measured[step]:.4f}", file=sys.stderr)
    return {
        "arm": asdict(arm), "setting": asdict(setting), **facts, "train_cpu_seconds": time.process_time() - begun,
        "trainable": sum(p.numel() for p in parameters), "losses": losses, "held_out": measured,
    }  # fmt: skip


def table(cache: Path, setting: Setting) -> list[dict[str, Any]]:
    """One row a start and seed: at its best rate (by the mean smoothed loss), and at every rate shared with plain."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(cache.glob("*.json")):
        run = json.loads(path.read_text())
        if run["setting"] == asdict(setting):
            run["smooth"] = _smooth(run["losses"])
            run["held_out"] = {int(k): v for k, v in run["held_out"].items()}
            runs.setdefault((run["arm"]["start"], run["arm"]["seed"]), []).append(run)
    rows = []
    for (start, seed), found in runs.items():
        plain = runs.get((PLAIN, seed))
        shared = sorted(run["arm"]["rate"] for run in found if _at(plain, run["arm"]["rate"]))
        for kind, mine, theirs in (
            ("best rate", _best(found), _best(plain)),
            *(("shared rate", _at(found, rate), _at(plain, rate)) for rate in shared),
        ):
            row = {"start": start, "seed": seed, "kind": kind, "rate": mine["arm"]["rate"], "auc": _auc(mine)}
            row["last_loss"] = list(mine["smooth"].values())[-1]
            row["least_held_out"] = min(mine["held_out"].values())
            if theirs is not None:
                aim, held_aim = list(theirs["smooth"].values())[-1], min(theirs["held_out"].values())
                row["steps_to_plain"] = _first(mine["smooth"], aim)
                row["steps_to_plain_held_out"] = _first(mine["held_out"], held_aim)
                row["plain_steps"] = len(theirs["smooth"])
            row["rates_tried"] = sorted(run["arm"]["rate"] for run in found)
            rows.append(row)
    return sorted(
        rows, key=lambda row: (row["kind"], row["kind"] == "shared rate" and row["rate"], row["seed"], row["auc"])
    )


def _smooth(losses: dict[str, float]) -> dict[int, float]:
    curve = Curve({int(k): v for k, v in losses.items()}, {})
    return curve.smoothed(curve.span)


def _auc(run: dict[str, Any]) -> float:
    if not all(math.isfinite(v) for v in run["losses"].values()):
        return math.inf
    return statistics.mean(run["smooth"].values())


def _best(runs: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """The run with the least mean loss: it ranks speed and end alike, and every arm by the same rule."""
    return min(runs, key=_auc) if runs else None


def _at(runs: list[dict[str, Any]] | None, rate: float) -> dict[str, Any] | None:
    return next((run for run in runs or () if math.isclose(run["arm"]["rate"], rate)), None)


def _first(curve: dict[int, float], aim: float) -> int | None:
    """The first step at or below `aim`, noise in the first steps aside: the curve is smoothed or held out."""
    return next((step for step, loss in curve.items() if step > 0 and loss <= aim), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--columns", type=json.loads, default={}, help="as in a recipe, in JSON")
    parser.add_argument(
        "--cache", type=Path, required=True, help="a folder for the arms; those in it are not run again"
    )
    parser.add_argument("--arms", default=",".join(USUAL))
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--base", default="dense", help="dense, or a quantizer and its bits: nf4, rtn-2, ...")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="learnt tokens that gradients are taken of")
    parser.add_argument("--table", action="store_true", help="only make the table of what is there")
    a = parser.parse_args()
    data = DataSource(path=a.data, columns=a.columns)
    name = Path(a.data).parent.name  # the file's own name says no more than train
    setting = Setting(name, a.r, a.steps, a.batch, a.length, a.every, a.held_out, a.tokens, a.dtype, a.base)

    def load() -> tuple[Any, Any]:
        model, tokenizer = slimtune.load(a.model, dtype=a.dtype)
        if a.base != "dense":
            method, _, bits = a.base.partition("-")
            options = {"residual_rank": a.r, **({"bits": int(bits)} if bits else {})}
            if QUANTIZERS[method].needs:
                options |= {"tokenizer": tokenizer, "calibration": replace(data, samples=32, length=512)}
            slimtune.quantize(model, method, **options)
        return model, tokenizer

    key = f"{Path(a.model).name}, {name}, {a.base}, r={a.r}, {a.steps} steps of {a.batch} x {a.length}, {a.dtype}"
    cache = a.cache / re.sub(r"\W+", "-", f"{key} {a.held_out} {a.tokens} {a.every}")  # arms of one setting
    cache.mkdir(parents=True, exist_ok=True)
    for start in [] if a.table else a.arms.split(","):
        for arm in [Arm(start, float(rate), int(seed)) for seed in a.seeds.split(",") for rate in a.rates.split(",")]:
            place = cache / arm.file
            if not place.exists():
                kept = json.dumps(train(arm, setting, data, load))
                place.write_text(kept + "\n")
    rows = table(cache, setting)
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    before[f"{key}, held out every {a.every}"] = {
        "environment": environment(),
        "setting": asdict(setting),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(before, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
