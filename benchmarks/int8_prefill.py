"""Prefill of 512 tokens on one core: bfloat16, W8A8 by plain `torch._int_mm`, and slimtune's integers.

    OMP_NUM_THREADS=1 python benchmarks/int8_prefill.py [--model smollm2-135m] [--layers 4]

Two models: SmolLM2-135M, and a random Llama of the 1B shape (2048 wide, 8192 inside, 32 heads, 8 of them for keys and
values) with a few of its 16 layers, since they are all alike. Only the last row of logits is computed, as in
generation. The reference decodes the weights and rounds inputs in floats, as slimtune does elsewhere. Arms run in
turns; the best of the repeats counts, in CPU seconds of the process, which a busy machine disturbs less than wall
time. slimtune's arms run as its `evaluate` and `generate` do, with its loops for norms, attention and gates (`with
slimtune's loops` is bfloat16 in that way); `bfloat16` and the plain arm are stock transformers. The plain arm rounds
tokens and scales products in the model's dtype, a line each. The rotated arms have their online transforms (before the
last linears of attention and feed-forward, or before all linears) timed on their own.

All of it twice: with what the processor has, and with oneDNN told to go without AMX, as on most processors. Its
products in bfloat16 are then those of AVX512 with BF16 units (or emulated, where the processor has none).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune
from slimtune.arch import bind
from slimtune.calib.cpu import cpu_kernels
from slimtune.kernels.dispatch import reference
from slimtune.recipe.run import environment
from slimtune.rotate.online import OnlineTransform

RESULTS = Path(__file__).parent / "results" / "int8_prefill.json"
UNITS = {"all": "DEFAULT", "no AMX": "AVX512_CORE_BF16"}
"""What oneDNN may use, by its names."""

ROTATED = {
    "W4A4 rotated, slimtune": ("r4", "heads"),
    "W4A4, all inputs turned, slimtune": ("inputs", "r4", "heads"),
}
"""What turns online."""

LOOPS = "bfloat16, with slimtune's loops"
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
    models[LOOPS] = models["bfloat16"]
    plain = make()
    for port in bind(plain).linears:
        parent, _, leaf = port.name.rpartition(".")
        owner = plain.get_submodule(parent)
        setattr(owner, leaf, PlainInt8(owner.get_submodule(leaf)))
    models["W8A8, plain _int_mm"] = plain
    for name, (bits, activations) in SETTINGS.items():
        models[f"{name}, slimtune"] = quantized(make(), bits, activations)
    for name, online in ROTATED.items():
        models[name] = quantized(slimtune.rotate(make(), online=online), 4, 4)
    models["W8A8, slimtune's reference"] = models["W8A8, slimtune"]
    return models


def quantized(model: Any, bits: int, activations: int) -> Any:
    """`model` with one scale a row and a token."""
    options = {"bits": bits, "group_size": -1, "sym": True, "grid": "minmax"}
    return slimtune.quantize(model, "rtn", activations={"bits": activations}, **options)


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


@contextmanager
def timed() -> Iterator[list[float]]:
    """CPU seconds of the online transforms in the block, summed up in the list's only number."""
    spent, real = [0.0], OnlineTransform.__call__

    def call(self: OnlineTransform, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        start = time.process_time()
        turned = real(self, module, args)
        spent[0] += time.process_time() - start
        return turned

    OnlineTransform.__call__ = call  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        OnlineTransform.__call__ = real  # type: ignore[method-assign]


@torch.no_grad()
def measure(models: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Best CPU and wall seconds of each arm, and of its online transforms."""
    tokens = torch.randint(1024, (1, 512), generator=torch.Generator().manual_seed(0))
    best: dict[str, dict[str, float]] = {name: {} for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            with ExitStack() as stack:
                online = stack.enter_context(timed())
                if "slimtune" in name:
                    stack.enter_context(cpu_kernels(model))
                if name.endswith("reference"):
                    stack.enter_context(reference())
                cpu, wall = time.process_time(), time.perf_counter()
                model(input_ids=tokens, use_cache=True, logits_to_keep=1)
                spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
            if name in ROTATED:
                spent["online_cpu_seconds"] = online[0]
            if repeat:  # the first packs weights
                best[name] = {key: min(best[name].get(key, seconds), seconds) for key, seconds in spent.items()}
    return best


def print_rows(arguments: argparse.Namespace) -> None:
    """Measure both models in this process."""
    made = {
        Path(arguments.model).name: lambda: slimtune.load(arguments.model, dtype="bfloat16")[0],
        f"1B shape, {arguments.layers} layers": billion(arguments.layers),
    }
    for model, make in made.items():
        found = measure(arms(make), arguments.repeats)
        for arm, seconds in found.items():
            row: dict[str, Any] = {"units": arguments.units, "model": model, "arm": arm}
            row |= {key: round(value, 4) for key, value in seconds.items()}
            row["speedup"] = round(found["bfloat16"]["cpu_seconds"] / seconds["cpu_seconds"], 3)
            if arm in ROTATED:
                row["online_share"] = round(seconds["online_cpu_seconds"] / seconds["cpu_seconds"], 3)
            print(json.dumps(row), flush=True)


def main() -> None:
    """Measure, each setting of oneDNN in a process of its own, and write benchmarks/results/int8_prefill.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--units", choices=UNITS, help="run with these, here, and print the rows")
    arguments = parser.parse_args()
    if arguments.units:
        print_rows(arguments)
        return
    result: dict[str, Any] = {"environment": environment(), "tokens": 512, "repeats": arguments.repeats, "rows": []}
    for units, isa in UNITS.items():
        command = [sys.executable, "-W", "ignore", *sys.argv, "--units", units]
        variables = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                result["rows"].append(json.loads(line))
        if process.returncode:
            raise SystemExit(process.returncode)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
