"""What a product with a few rows costs: bfloat16, float32, decoding a 4-bit weight first, and the int4 product.

    python benchmarks/small_products.py

One thread; seconds of wall time, the least of five rounds of twenty. `error` is relative to float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.quant.decoding import decoding
from slimtune.quant.linear import FEW, QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.recipe.run import environment

RESULT = Path(__file__).parent / "results" / "small_products.json"


def least(product: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    product()
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            product()
        rounds.append((time.perf_counter() - start) / 20)
    return min(rounds)


def main() -> None:
    """Time every shape, and write the JSON result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for out, features in ((1536, 576), (576, 1536), (8192, 2048)):
        weight = 0.02 * torch.randn(out, features)
        linear = nn.Linear(features, out, bias=False, dtype=torch.bfloat16)
        layer = QuantLinear.from_linear(linear, Rtn(bits=4, group_size=64)(weight, {}))
        half, full = layer.dequantize(torch.bfloat16), layer.dequantize()
        for rows in (1, 4, FEW):
            x = torch.randn(rows, features)
            y = x.to(torch.bfloat16)
            with torch.no_grad():
                seconds = {
                    "bfloat16": least(lambda y=y, half=half: y @ half.T),  # type: ignore[misc]
                    "float32": least(lambda x=x, full=full: x @ full.T),  # type: ignore[misc]
                    "decoded": least(lambda y=y, layer=layer: layer(y)),  # type: ignore[misc]
                }
                with decoding(layer):
                    seconds["int4"] = least(lambda y=y, layer=layer: layer(y))  # type: ignore[misc]
                    error = float((layer(y).float() - x @ full.T).norm() / (x @ full.T).norm())
            found.append({"out": out, "in": features, "rows": rows, "error": error, "seconds": seconds})
            print(out, features, rows, {name: round(1e6 * value) for name, value in seconds.items()}, flush=True)
    RESULT.write_text(json.dumps({"environment": environment(), "seed": 0, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
