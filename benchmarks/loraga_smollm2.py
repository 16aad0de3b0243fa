"""LoRA-GA on SmolLM2-135M: how good the gradient sketch is, what a first step does from each start, and what it costs.

Three parts, each in a process of its own, on 8 Alpaca conversations of 128 tokens as 2 batches of 4:

- `sketch`: the share of the best 2r directions' energy that the sketch's have, beside an exact SVD of exact gradients,
  over the 28 linears of four blocks, at r = 8 and 32;
- `alignment`: the cosine between the gradient and the change of the weight that the first step makes, under gradient
  descent and under Adam (which steps by signs), for each start;
- `cost ARM`: CPU seconds and bytes held, of ours, of PEFT's LoRA-GA, and of the bare forward and backward passes that
  both contain; with `--rows 128` of 16,384 tokens, with `--shape 1b` of a random Llama of the 1B shape in bfloat16,
  r=16.

    python benchmarks/loraga_smollm2.py --data alpaca.jsonl.gz [--model DIR] [--part sketch]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune
from slimtune.arch import bind
from slimtune.calib.formats import normalise
from slimtune.calib.gradients import Batch, GradientSketch, learnt_tokens
from slimtune.calib.rows import DataSource, read_rows
from slimtune.kernels import compiled
from slimtune.linalg.sketch import Triples, exact
from slimtune.lora.attach import adapted, add_lora, sketch_targets
from slimtune.lora.inits import INITS, Knobs, Place
from slimtune.recipe.run import environment
from slimtune.train.data import Collator, padding_id, tokenize

SHAPE_1B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
RESULT = Path(__file__).parent / "results" / "loraga_smollm2.json"
BLOCKS, RANKS, LENGTH = (0, 10, 20, 29), (8, 32), 128
COSTS = ("bare", "ours", "ours r=32", "peft")
PARTS = ("sketch", "alignment", *(f"cost {arm}" for arm in COSTS))


def batches_of(data: str, tokenizer: Any, seed: int, rows: int) -> list[Batch]:
    """Batches of 4 rows of 128 tokens, all learnt."""
    conversations = normalise(read_rows(DataSource(path=data))[: max(2000, 8 * rows)], where=data)
    examples, _ = tokenize(conversations, tokenizer, LENGTH, completion_only_loss=False)
    long = [example for example in examples if len(example.input_ids) == LENGTH]
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed)).tolist()[:rows]
    collate = Collator(padding_id(tokenizer))
    return [collate([long[i] for i in order[n : n + 4]]) for n in range(0, rows, 4)]


def billion() -> Any:
    """A random Llama of the 1B shape, whose tokens are SmolLM2's."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE_1B)).to(torch.bfloat16)


def exact_gradients(model: Any, names: list[str], batches: list[Batch]) -> dict[str, Tensor]:
    """Of the mean loss of a token, by autograd."""
    model.requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in names}
    total = sum(learnt_tokens(model, batch) for batch in batches)
    for batch in batches:
        (model(**batch, use_cache=False).loss * (learnt_tokens(model, batch) / total)).backward()
    found = {name: weight.grad.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False).grad = None
    return found


def some_layers(model: Any) -> list[str]:
    blocks = [block.name for i, block in enumerate(bind(model).blocks) if i in BLOCKS]
    return [port.name for port in bind(model).linears if port.block in blocks or port.name.startswith(tuple(blocks))]


def captured(g: Tensor, best: Triples, mine: Triples) -> tuple[float, float]:
    """The share of the best directions' energy in mine: on the output side, and on the input side."""
    energy = float(best.s.square().sum())
    return float((mine.u.T @ g).square().sum()) / energy, float((g @ mine.v).square().sum()) / energy


def sketch_part(model: Any, batches: list[Batch]) -> dict[str, Any]:
    names = some_layers(model)
    gradients = exact_gradients(model, names, batches)
    rows = []
    for rank in RANKS:
        best = {name: exact(g, 2 * rank) for name, g in gradients.items()}
        for passes in (1, 2, 4):
            for seed in (0, 1, 2):
                found = sketch_targets(
                    model, batches, directions=2 * rank, target_modules=names, passes=passes, seed=seed
                )
                shares = [captured(g, best[name], found.layers[name].triples) for name, g in gradients.items()]
                outputs, inputs = zip(*shares, strict=True)
                norms = [found.layers[name].norm / float(g.norm()) for name, g in gradients.items()]
                rows.append(
                    {
                        "r": rank, "passes": passes, "seed": seed, "layers": len(names),
                        "output_side": statistics.mean(outputs), "output_side_least": min(outputs),
                        "input_side": statistics.mean(inputs), "input_side_least": min(inputs),
                        "norm_over_true": [min(norms), max(norms)],
                    }
                )  # fmt: skip
                print(rows[-1], file=sys.stderr)
    return {"rows": rows}


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30))


def alignment(g: Tensor, a: Tensor, b: Tensor) -> dict[str, float]:
    """Of the descent that one step makes on `W + s B A`, with the gradient: `-dW` and `G`. The scaling drops out."""
    to_a, to_b = b.T @ g, g @ a.T
    return {
        "sgd": cosine(to_b @ a + b @ to_a, g),
        "adam": cosine(to_b.sign() @ a + b @ to_a.sign(), g),
    }


def alignment_part(model: Any, batches: list[Batch]) -> dict[str, Any]:
    names = some_layers(model)
    gradients = exact_gradients(model, names, batches)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    rows = []
    for rank in RANKS:
        scaling = 16 / rank**0.5
        triples = {name: exact(g, 2 * rank) for name, g in gradients.items()}
        sketched = sketch_targets(model, batches, directions=2 * rank, target_modules=names)
        arms: dict[str, tuple[str, Knobs]] = {
            "lora-ga stable": ("lora-ga", Knobs(scale="stable")),
            "lora-ga auto": ("lora-ga", Knobs()),
            "gradient-a": ("gradient-a", Knobs()),
            "lora-one": ("lora-one", Knobs()),
            "pissa": ("pissa", Knobs()),
        }
        for arm, (init, knobs) in arms.items():
            for source in ("exact", "sketch") if INITS[init].directions else ("",):
                found = []
                for name, g in gradients.items():
                    known = triples[name] if source == "exact" else sketched.layers[name].triples
                    make = INITS[init].factors
                    assert make is not None
                    a, b = make(Place(weights[name], known, rank, scaling), knobs)
                    size = scaling * float((b @ a).norm() / weights[name].norm())
                    found.append({**alignment(g, a, b), "ratio": size})
                rows.append(_mean(rank, f"{arm} ({source})" if source else arm, found))
        fresh = []
        for g in gradients.values():
            a = torch.empty(rank, g.shape[1])
            nn.init.kaiming_uniform_(a, a=5**0.5)
            fresh.append({**alignment(g, a, torch.zeros(len(g), rank)), "ratio": 0.0})
        rows.append(_mean(rank, "default", fresh))
        theirs = []
        for name, g in gradients.items():  # PEFT's own factors, layer by layer
            a, b = peft_factors(weights[name], g, rank)
            size = scaling * float((b @ a).norm() / weights[name].norm())
            theirs.append({**alignment(g, a, b), "ratio": size})
        rows.append(_mean(rank, "PEFT lora_ga", theirs))
    return {"rows": rows}


def peft_factors(weight: Tensor, gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What PEFT's LoRA-GA makes of a gradient, by PEFT itself."""
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight.data = weight.clone()
    holder[0]._peft_loraga_grad = gradient
    wrapped = get_peft_model(holder, _peft_config(rank, ["0"]))  # type: ignore[arg-type]
    layer: Any = next(iter(adapted(wrapped).values()))
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def _peft_config(rank: int, targets: list[str]) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=16, use_rslora=True, target_modules=targets, init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip


def _mean(rank: int, arm: str, found: list[dict[str, float]]) -> dict[str, Any]:
    row = {key: statistics.mean(each[key] for each in found) for key in found[0]}
    ratios = [each["ratio"] for each in found]
    print(rank, arm, row, file=sys.stderr)
    return {"r": rank, "arm": arm, **row, "ratio_median": statistics.median(ratios), "ratio_greatest": max(ratios)}


def cost_part(arm: str, model: Any, batches: list[Batch], usual: int) -> dict[str, Any]:
    """CPU seconds, and bytes held beyond the model between taking gradients and starting the adapter."""
    torch.set_num_threads(1)
    tool, _, rank = arm.partition(" r=")
    targets = sorted({port.name.rsplit(".", 1)[-1] for port in bind(model).linears})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())
    model(**batches[0], use_cache=False).loss.backward()  # warms up
    handle.remove()
    process = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # what is called the peak starts anew
    before, start = process.memory_info().rss, time.process_time()
    facts: dict[str, Any] = {}
    if tool == "bare":
        handle = model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
        handle.remove()
        facts["gradients_cpu_seconds"] = time.process_time() - start
    elif tool == "ours":
        r = int(rank or usual)
        found: GradientSketch = sketch_targets(model, batches, directions=2 * r)
        facts["gradients_cpu_seconds"] = time.process_time() - start
        kept = sum(t.numel() * t.element_size() for layer in found.layers.values() for t in layer.triples)
        facts |= {"held_while_taking_bytes": found.held_bytes, "held_bytes": kept}
        start = time.process_time()
        add_lora(model, r=r, lora_alpha=16, use_rslora=True, init="lora-ga", gradients=found)
        facts["init_cpu_seconds"] = time.process_time() - start
    else:
        config = _peft_config(usual, targets)

        def step() -> None:
            for batch in batches:
                model(**batch, use_cache=False).loss.backward()

        preprocess_loraga(model, config, step)
        facts["gradients_cpu_seconds"] = time.process_time() - start
        held = [m._peft_loraga_grad for m in model.modules() if "_peft_loraga_grad" in vars(m)]
        facts["held_bytes"] = sum(t.numel() * t.element_size() for t in held)
        start = time.process_time()
        get_peft_model(model, config)
        facts["init_cpu_seconds"] = time.process_time() - start
    facts["peak_over_start_bytes"] = _peak() - before
    return {"arm": arm, **facts, "c_loops": compiled.library() is not None}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="of 128 tokens, for the costs")
    parser.add_argument("--shape", choices=("smollm2-135m", "1b"), default="smollm2-135m", help="for the costs")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--part", choices=PARTS, help="run this one here and print its facts")
    arguments = parser.parse_args()
    other = "" if arguments.shape == "smollm2-135m" else f", {arguments.shape} shape"
    other += "" if arguments.rows == 8 else f", {arguments.rows} rows"
    if arguments.part is None:
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        for part in arguments.parts:
            command = [sys.executable, "-W", "ignore", __file__, "--model", arguments.model, "--data", arguments.data]
            command += ["--rows", str(arguments.rows), "--shape", arguments.shape, "--part", part]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            kept[part + other] = {**json.loads(ran.stdout), "cpu": environment()["cpu"]}
            print(part + other, ran.stdout.strip()[:400])
            RESULT.write_text(
                json.dumps(kept | {"environment": environment(), "seed": arguments.seed}, indent=1) + "\n"
            )
        return
    model, tokenizer = slimtune.load(arguments.model)
    batches = batches_of(arguments.data, tokenizer, arguments.seed, arguments.rows)
    if arguments.shape == "1b":
        model = billion()
    if arguments.part == "sketch":
        result = sketch_part(model, batches)
    elif arguments.part == "alignment":
        result = alignment_part(model, batches)
    else:
        usual = 16 if arguments.shape == "1b" else 8
        result = cost_part(arguments.part.removeprefix("cost "), model, batches, usual)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
