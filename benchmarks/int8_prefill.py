"""Prefill of 512 tokens on one core: bfloat16, W8A8 by plain `torch._int_mm`, and slimtune's integers.

    OMP_NUM_THREADS=1 python benchmarks/int8_prefill.py [--model smollm2-135m] [--layers 4]

Two models: SmolLM2-135M, and a random Llama of the 1B shape (2048 wide, 8192 inside, 32 heads, 8 of them for keys and
values) with a few of its 16 layers, since they are all alike. Only the last row of logits is computed, as in
generation. The reference decodes the weights and rounds inputs in floats, as slimtune does elsewhere. Arms run in
turns; the best of the repeats counts, in CPU seconds of the process, which a busy machine disturbs less than wall
time. The plain arm rounds tokens and scales products in the model's dtype, a line each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune
from slimtune.arch import bind
from slimtune.kernels.dispatch import reference
from slimtune.recipe.run import environment

RESULTS = Path(__file__).parent / "results" / "int8_prefill.json"
SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}


class PlainInt8(nn.Module):
    """What a page of PyTorch makes of W8A8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(1) / 127
        self.codes = (weight / self.scale[:, None]).round().to(torch.int8).T

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        scale = flat.abs().amax(1, keepdim=True) / 127
        y = torch._int_mm((flat / scale).round().to(torch.int8), self.codes) * scale * self.scale
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def arms(make: Callable[[], Any]) -> dict[str, Any]:
    """The models by name, all in bfloat16 but for what is in integers."""
    models = {"bfloat16": make()}
    plain = make()
    for port in bind(plain).linears:
        parent, _, leaf = port.name.rpartition(".")
        owner = plain.get_submodule(parent)
        setattr(owner, leaf, PlainInt8(owner.get_submodule(leaf)))
    models["W8A8, plain _int_mm"] = plain
    for name, (bits, activations) in SETTINGS.items():
        model = make()
        options = {"bits": bits, "group_size": -1, "sym": True, "grid": "minmax"}
        models[f"{name}, slimtune"] = slimtune.quantize(model, "rtn", activations={"bits": activations}, **options)
    models["W8A8, slimtune's reference"] = models["W8A8, slimtune"]
    return models


def billion(layers: int) -> Callable[[], Any]:
    """A random Llama of the 1B shape."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
        tie_word_embeddings=True,
    )

    def make() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()

    return make


@torch.no_grad()
def measure(models: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Best CPU and wall seconds of each arm."""
    tokens = torch.randint(1024, (1, 512), generator=torch.Generator().manual_seed(0))
    best = {name: {"cpu_seconds": float("inf"), "wall_seconds": float("inf")} for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            cpu, wall = time.process_time(), time.perf_counter()
            with reference() if name.endswith("reference") else nullcontext():
                model(input_ids=tokens, use_cache=True, logits_to_keep=1)
            spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
            if repeat:  # the first packs weights
                best[name] = {key: min(best[name][key], seconds) for key, seconds in spent.items()}
    return best


def main() -> None:
    """Measure both models and write benchmarks/results/int8_prefill.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    made = {
        Path(arguments.model).name: lambda: slimtune.load(arguments.model, dtype="bfloat16")[0],
        f"1B shape, {arguments.layers} layers": billion(arguments.layers),
    }
    result: dict[str, Any] = {"environment": environment(), "tokens": 512, "repeats": arguments.repeats, "rows": []}
    for model, make in made.items():
        found = measure(arms(make), arguments.repeats)
        for arm, seconds in found.items():
            ratio = found["bfloat16"]["cpu_seconds"] / seconds["cpu_seconds"]
            row = {
                "model": model,
                "arm": arm,
                **{k: round(v, 4) for k, v in seconds.items()},
                "speedup": round(ratio, 3),
            }
            result["rows"].append(row)
            print(row, flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
