"""What the GPU scripts share: which card, where the result goes, how time is taken, and models of random codes.

Not a benchmark itself: run, it says which card there is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.export.load import empty_model
from slimtune.quant.layouts import LAYOUTS, Layout
from slimtune.quant.linear import QuantLinear
from slimtune.recipe.run import environment

RESULTS = Path(__file__).parent / "results"
OPTIONS: dict[str, dict[str, Any]] = {"affine": {"group_size": 64}, "e8p": {}, "trellis": {}}
"""The fields of each layout beside its sizes and bits."""


def options(text: str) -> argparse.ArgumentParser:
    """The command line that all these scripts have."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a tiny size, to see it run")
    parser.add_argument("--output", type=Path, help="default: results/gpu_*_<card>.json; with --device cpu nothing")
    return parser


def chosen(name: str) -> torch.device:
    """The device to run on. Leaves with one message where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch can use: this measures one (--device cpu runs it at a tiny size)")
    return torch.device(name)


def write(script: str, device: torch.device, output: Path | None, facts: dict[str, Any]) -> None:
    """Put `facts` where they belong, with the card's name and the versions."""
    if output is None and device.type == "cuda":
        card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
        output = RESULTS / f"gpu_{script}_{card}.json"
    if output is not None:
        output.write_text(json.dumps({"environment": environment(), **facts}, indent=1) + "\n")


def microseconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Of one call: the least of a few rounds, each long enough to be timed. On a CPU of the only one."""
    calls, best = 1 if device.type == "cpu" else 20, float("inf")
    for _ in range(1 if device.type == "cpu" else rounds + 1):  # the first compiles
        settle(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        settle(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return round(1e6 * best, 1)


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that was allocated on a GPU since its peak was last forgotten."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def random_codes(layout: Layout, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors of a layout: codes are noise, and scales make the weights as small as trained ones are."""
    made: dict[str, Tensor] = {}
    for name, (shape, dtype) in layout.tensors().items():
        if dtype == torch.uint8:
            top = 2**2 if name == "zero" else 256
            made[name] = torch.randint(top, shape, dtype=dtype, device=device, generator=generator)
        elif name.startswith("sign"):
            signs = torch.randint(2, shape, device=device, generator=generator) * 2.0 - 1
            made[name] = (signs * (0.02 if name == "sign_out" else 1)).to(dtype)
        else:
            made[name] = torch.full(shape, 0.01, dtype=dtype, device=device)
    return made


def random_model(
    config: Any, layout: str | None, bits: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """A model of random weights, made on `device` tensor by tensor: nothing dense is held that the model does not hold.

    With a `layout` the linears of its blocks are packed codes that were never weights.
    """
    model: nn.Module = empty_model(config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for port in bind(model).linears if layout else ():
        made = LAYOUTS[layout](  # type: ignore[index, call-arg]
            out_features=port.out_features, in_features=port.in_features, bits=bits, **OPTIONS[layout or ""]
        )
        packed = QuantLinear(made, device="meta", dtype=dtype)
        for name, tensor in random_codes(made, device, generator).items():
            setattr(packed, name, nn.Parameter(tensor, requires_grad=False))
        owner, _, leaf = port.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, packed)
    for module in list(model.modules()):
        for leaf, old in list(module.named_parameters(recurse=False)):
            if old.is_meta:
                new = torch.empty_like(old, device=device)
                new.fill_(1) if old.ndim == 1 else new.normal_(0, 0.02, generator=generator)
                setattr(module, leaf, nn.Parameter(new, requires_grad=False))
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))
    model.tie_weights()  # type: ignore[operator]
    return model


def packed_by_bitsandbytes(model: nn.Module, device: torch.device) -> None:
    """Random NF4 layers of bitsandbytes for the linears of the blocks of `model`, one dense weight at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for port in bind(model).linears:
        linear = Linear4bit(port.in_features, port.out_features, bias=False, quant_type="nf4", device="meta")
        linear.compute_dtype = torch.bfloat16
        dense = torch.empty(port.out_features, port.in_features, dtype=torch.bfloat16).normal_(0, 0.02)
        linear.weight = Params4bit(dense, requires_grad=False, quant_type="nf4", module=linear)
        owner, _, leaf = port.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, linear.to(device))


if __name__ == "__main__":
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
