"""What a product with a few rows costs: bfloat16, float32, decoding a weight first, PyTorch's int4 product, and the
loops that multiply a weight as it is stored.

    python benchmarks/small_products.py

One thread; CPU seconds, the least of five rounds of twenty. `error` is relative to float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.kernels.cpu import Int4Weight
from slimtune.quant.base import QTensor
from slimtune.quant.decoding import decoding
from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.linear import FEW, QuantLinear
from slimtune.quant.products import multiplier
from slimtune.quant.rotated import Lattice, Trellis
from slimtune.recipe.run import environment

SHAPES = ((1536, 576), (576, 1536), (8192, 2048))
METHODS: dict[str, Callable[[int, int], Layout]] = {
    **{f"affine-{bits}": partial(Affine, bits=bits, group_size=64) for bits in (2, 3, 4, 8)},
    "nf4": partial(Codebook, levels="nf4", group_size=64, nested=True),
    **{f"e8p-{bits}": partial(Lattice, bits=bits) for bits in (2, 3, 4)},
    **{f"trellis-{bits}": partial(Trellis, bits=bits) for bits in (2, 3, 4)},
}
RESULT = Path(__file__).parent / "results" / "small_products.json"


def least(product: Callable[[], Tensor]) -> float:
    """CPU seconds of one call."""
    product()
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            product()
        rounds.append((time.process_time() - start) / 20)
    return min(rounds)


def random_weight(layout: Callable[[int, int], Layout], out: int, features: int) -> QTensor:
    """Any codes, and small scales: what a product costs does not depend on them."""
    made = layout(out, features)
    stored = {
        name: torch.randint(0, 4 if name == "zero" else 256, shape, dtype=kind)
        if kind == torch.uint8
        else 0.02 * torch.rand(shape).to(kind)
        for name, (shape, kind) in made.tensors().items()
    }
    return QTensor(stored, made)


@torch.no_grad()
def measure(weight: QTensor, rows: int) -> dict[str, Any]:
    """Seconds of every way, and how far from float32 the fast ones are."""
    half, full, loops = weight.dequantize(torch.bfloat16), weight.dequantize(), multiplier(weight)
    linear = nn.Linear(full.shape[1], full.shape[0], bias=False, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(linear, weight)
    x = torch.randn(rows, full.shape[1])
    y, exact = x.to(torch.bfloat16), x @ full.T
    seconds = {
        "bfloat16": least(lambda: y @ half.T),
        "float32": least(lambda: x @ full.T),
        "decoded": least(lambda: layer(y)),
    }
    errors = {}
    with decoding(layer):
        ways = {"int4": layer.small if isinstance(layer.small, Int4Weight) else None, "packed": loops}
        for name, way in ways.items():
            if way is not None:
                seconds[name] = least(partial(way, y))
                errors[name] = float((way(y).float() - exact).norm() / exact.norm())
    return {"seconds": seconds, "error": errors}


def main() -> None:
    """Time every shape, and write the JSON result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        for out, features in SHAPES:
            weight = random_weight(method, out, features)
            for rows in (1, 4, FEW):
                row = measure(weight, rows)
                found.append({"weight": name, "out": out, "in": features, "rows": rows, **row})
                print(name, out, features, rows, {k: round(1e6 * v) for k, v in row["seconds"].items()}, flush=True)
    RESULT.write_text(json.dumps({"environment": environment(), "seed": 0, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
