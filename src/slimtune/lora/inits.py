"""Where LoRA factors start.

PEFT starts most of them itself. What depends on the weight before it was quantized is found while it is quantized, when
both are in memory, and stays beside the layer (`QuantLinear.start`) until an adapter takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from slimtune.linalg.lowrank import Factors, low_rank
from slimtune.quant.base import Stats


@dataclass(frozen=True)
class Init:
    """A way to start factors.

    `peft` is PEFT's `init_lora_weights`. `start`, where there is one, gives better ones for a quantized layer:
    `(weight [out, in], base [out, in], rank, stats) -> Factors` whose `b @ a` is the update, scaling included; `base`
    is the weight as quantized, and `stats` what its quantizer needed.
    """

    what: str
    peft: bool | str = True
    start: Callable[[Tensor, Tensor, int, Stats], Factors] | None = None


def residual(weight: Tensor, base: Tensor, rank: int, stats: Stats) -> Factors:
    """What quantization lost, as well as `rank` allows: `W ≈ Ŵ + BA`.

    Without statistics this is one step of LoftQ (arXiv 2310.08659), the truncated SVD of `W - Ŵ`; with the Hessian of
    the layer's inputs it is the outputs that are kept, as in LQ-LoRA (arXiv 2311.12023) and EoRA (arXiv 2410.21271).
    """
    return low_rank(weight - base, rank, stats.get("hessian"))


INITS: dict[str, Init] = {
    "default": Init("A Kaiming uniform, B zero"),
    "gaussian": Init("A Gaussian, B zero", "gaussian"),
    "residual": Init("what quantization lost, by truncated SVD, weighted by the calibration data", start=residual),
}
"""Every init by its recipe name."""
