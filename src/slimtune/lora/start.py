"""Putting factors where an init wants them, and saying what that did to each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.calib.gradients import GradientSketch
from slimtune.linalg.lowrank import Factors
from slimtune.linalg.sketch import Triples
from slimtune.lora.inits import INITS, Knobs, Place, product_norm
from slimtune.lora.split import PartlyFrozen, split
from slimtune.quant.blackbox import FROZEN
from slimtune.quant.linear import QuantLinear


@dataclass(frozen=True)
class StartFact:
    """How one layer started.

    `ratio` is `‖s B A‖ / ‖W‖`, subtracted again or not; `energy` the fraction of the squared gradient (or moment) in
    the directions the init was given; `overlap` how much those of two halves of the data have in common. `note` says
    what was done otherwise than asked.
    """

    name: str
    rank: int
    ratio: float
    energy: float | None = None
    overlap: float | None = None
    gradient_norm: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain values for `report.json`."""
        return asdict(self)


def parts(init: str, keep_residual: bool) -> int:
    """The rank of the whole adapter in multiples of the rank that trains."""
    return 1 + INITS[init].offset + keep_residual


def total_alpha(alpha: float, parts: int, use_rslora: bool) -> float:
    """The `lora_alpha` by which an adapter of `parts` times the rank has the scaling of one of the rank itself.

    >>> total_alpha(16, 2, use_rslora=False) / (2 * 8) == 16 / 8
    True
    >>> math.isclose(total_alpha(16, 2, use_rslora=True) / math.sqrt(2 * 8), 16 / math.sqrt(8))
    True
    """
    return alpha * (math.sqrt(parts) if use_rslora else parts)


@torch.no_grad()
def start_(
    layers: Mapping[str, Any],
    init: str,
    knobs: Knobs,
    *,
    gradients: GradientSketch | None = None,
    keep_residual: bool = False,
    seed: int = 0,
) -> list[StartFact]:
    """Start the factors of PEFT's `layers` (by their names in the model without an adapter) as `init` says.

    Each layer's adapter was made with a rank of `parts` times the one that trains. The rest becomes frozen: the start
    subtracted again, and what quantization lost.
    """
    facts = []
    for name, layer in layers.items():
        facts.append(_start_layer_(name, layer, init, knobs, gradients, keep_residual, seed))
    return facts


def _start_layer_(
    name: str, layer: Any, init: str, knobs: Knobs, gradients: GradientSketch | None, keep_residual: bool, seed: int
) -> StartFact:
    way, weight = INITS[init], dense_weight(layer.get_base_layer())
    whole_a, whole_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank, scaling = len(whole_a) // parts(init, keep_residual), layer.scaling["default"]
    known = gradients.layers.get(name) if gradients is not None else None
    live = Factors(whole_a[:rank].clone(), whole_b[:, :rank].clone())
    note = ""
    if way.factors is not None:
        if way.directions and (known is None or not known.norm):
            note = f"no {'gradient' if way.of == 'gradient' else 'token'} reached it: starts as default"
        else:
            triples = None if known is None else Triples(*(t.to(weight.device) for t in known.triples))
            found = way.factors(Place(weight, triples, rank, scaling, seed), knobs)
            live = Factors(*(t.to(whole_a) for t in found))
            wanted = way.directions * rank
            if triples is not None and wanted > len(triples.s):
                note = f"{len(triples.s)} directions of {wanted}: completed with random ones"
    frozen: list[Factors] = []
    if way.offset:
        frozen.append(Factors(live.a, -live.b) if not note.startswith("no") else Factors(live.a, 0 * live.b))
    if keep_residual:
        frozen.append(_residual(layer.get_base_layer(), live, scaling))
    a, b = torch.cat([live.a, *(f.a for f in frozen)]), torch.cat([live.b, *(f.b for f in frozen)], 1)
    whole_a.copy_(a)
    whole_b.copy_(b)
    if frozen:
        split_layer_(layer, rank)
    product = product_norm(live.a, live.b)
    size = scaling * product / max(float(weight.norm()), 1e-30) if product else 0.0
    if known is None:
        return StartFact(name, rank, size, note=note)
    return StartFact(name, rank, size, known.energy, known.overlap, known.norm if way.of == "gradient" else None, note)


def _residual(base: nn.Module, live: Factors, scaling: float) -> Factors:
    """What the layer lost, cut or filled with zeros to the rank of `live`."""
    a, b = torch.zeros_like(live.a), torch.zeros_like(live.b)
    if isinstance(base, QuantLinear) and base.start is not None:
        rank, share = min(len(a), len(base.start.a)), scaling**-0.5
        a[:rank], b[:, :rank] = share * base.start.a[:rank], share * base.start.b[:, :rank]
    return Factors(a, b)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that a linear computes with, float32 `[out, in]`."""
    if isinstance(layer, FROZEN):
        return layer.dequantize()
    return cast(nn.Linear, layer).weight.detach().to(torch.float32)


def split_layer_(layer: Any, rank: int) -> None:
    """Freeze all of an adapted layer's factors but the first `rank` rows of A and columns of B."""
    for factors, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
        factors["default"] = split(factors["default"].weight.detach(), rank, dim)


def live_ranks(layers: Mapping[str, Any]) -> dict[str, int]:
    """The ranks that train, of the layers whose adapter is frozen in part."""
    factors = {name: layer.lora_A["default"] for name, layer in layers.items()}
    return {name: len(a.live) for name, a in factors.items() if isinstance(a, PartlyFrozen)}
