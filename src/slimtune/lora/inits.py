"""Where LoRA factors start.

PEFT starts some of them itself. What depends on the weight before it was quantized is found while it is quantized, when
both are in memory, and stays beside the layer (`QuantLinear.start`) until an adapter takes it. What depends on the
gradient, on the inputs or on the weight is a pure function below. Where a start is not zero and the model is to compute
what it did, the start is subtracted again by a frozen part of the adapter (`slimtune.lora.split`); the base is never
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.calib.sums import Kind
from slimtune.errors import RecipeError, nearest
from slimtune.linalg.lowrank import Factors, low_rank
from slimtune.linalg.sketch import Triples, completed
from slimtune.quant.base import Stats


class Place(NamedTuple):
    """A layer whose factors are to start: its `weight` `[out, in]` (as quantized), the leading `triples` of what the
    init looks at, the rank, what the product `B A` is multiplied by, and a seed for what is completed at random."""

    weight: Tensor
    triples: Triples | None
    rank: int
    scaling: float
    seed: int = 0


@dataclass(frozen=True)
class Knobs:
    """What can be chosen of an init.

    `direction` and `scale` are LoRA-GA's. `target` is the size that `scale: auto` gives the start, `‖s B A‖ / ‖W‖`: how
    far a step of a given rate goes depends on it (the paper's own scale has a median of 0.2 on SmolLM2). `gamma`
    divides it otherwise (0: the paper's 16, LoRA-One's 128).
    """

    direction: str = "ArB2r"
    scale: str = "auto"
    target: float = 0.2
    gamma: float = 0.0

    def __post_init__(self) -> None:
        for name, valid in (("direction", DIRECTIONS), ("scale", SCALES)):
            if (got := getattr(self, name)) not in valid:
                raise RecipeError(f"unknown {name}", where=f"init_{name}", got=got, remedy=nearest(got, valid))
        if not 0 < self.target < float("inf") or not 0 <= self.gamma < float("inf"):
            got = f"init_target {self.target}, init_gamma {self.gamma}"
            raise RecipeError("the size of a start is out of range", where="lora", got=got, wanted="above 0")


@dataclass(frozen=True)
class Init:
    """A way to start factors.

    `peft` is PEFT's `init_lora_weights`. `start`, where there is one, gives better ones for a quantized layer:
    `(weight [out, in], base [out, in], rank, stats) -> Factors` whose `b @ a` is the update, scaling included; `base`
    is the weight as quantized, and `stats` what its quantizer needed. `factors` gives A and B themselves. `directions`
    is how many singular triples that wants, in multiples of the rank, and `of` what they are of; `offset` says that the
    start is subtracted again, `searched` that its size is found by a line search where none is given.
    """

    what: str
    peft: bool | str = True
    start: Callable[[Tensor, Tensor, int, Stats], Factors] | None = None
    factors: Callable[[Place, Knobs], Factors] | None = None
    directions: int = 0
    searched: bool = False
    of: Kind = "gradient"
    offset: bool = False


def residual(weight: Tensor, base: Tensor, rank: int, stats: Stats) -> Factors:
    """What quantization lost, as well as `rank` allows: `W ≈ Ŵ + BA`.

    Without statistics this is one step of LoftQ (arXiv 2310.08659), the truncated SVD of `W - Ŵ`; with the Hessian of
    the layer's inputs it is the outputs that are kept, as in LQ-LoRA (arXiv 2311.12023) and EoRA (arXiv 2410.21271).
    """
    return low_rank(weight - base, rank, stats.get("hessian"))


def lora_ga(place: Place, knobs: Knobs) -> Factors:
    """Singular vectors of the gradient, without its singular values (LoRA-GA, arXiv 2407.05000, algorithm 1).

    With disjoint directions in A and B the first step of gradient descent is the best one of rank 2r. Of the `2r`
    leading triples, `ArB2r` gives the first r to A and the next r to B, `A2rBr` the other way round, `ArBr` every
    second one to each, `random` a random half.

    Both factors are multiplied by one number: `stable` is `out^¼ / √γ`, `gd` `1 / s`, `unit` 1, `weight-svd` the mean
    of `√(σᵢ(W) / s)` over the r largest; `auto` makes `‖s B A‖ / ‖W‖` the target.
    """
    assert place.triples is not None, "the init says what it looks at"
    rank, scaling = place.rank, place.scaling
    at_a, at_b = _DIRECTIONS[knobs.direction](rank, place.seed)
    a = _columns(place.triples.v, at_a, place.seed)
    b = _columns(place.triples.u, at_b, place.seed + 1)
    match knobs.scale:
        case "stable":
            size = len(b) ** 0.25 / (knobs.gamma or 16.0) ** 0.5
        case "gd":
            size = 1 / scaling
        case "unit":
            size = 1.0
        case "weight-svd":
            size = float((_norms(low_rank(place.weight, rank)) / scaling).sqrt().mean())
        case _:
            size = (knobs.target * float(place.weight.norm()) / (scaling * product_norm(a.T, b))) ** 0.5
    return Factors(size * a.T, size * b)


def lora_one(place: Place, knobs: Knobs) -> Factors:
    """One normalised step down the gradient: `B A = -G_r / (γ σ₁)`, balanced (LoRA-One, arXiv 2502.01235).

    The function of the model changes, by that step; nothing is subtracted. The paper's γ of 128 can be far too long a
    step (measured: docs/LOG.md), so without one B is made as large as serves the loss best.
    """
    assert place.triples is not None, "the init says what it looks at"
    u, s, v = place.triples.first(place.rank)
    root = (s / s[:1].clamp(min=torch.finfo(s.dtype).tiny) / (knobs.gamma or 128.0)).sqrt()
    return _padded(Factors((v * root).T, -u * root), place.rank)


def leading_a(place: Place, knobs: Knobs) -> Factors:
    """A reads the leading input directions of what the init looks at, B is zero: an unchanged function and a file of
    rank r. With the gradient this is LoRA-GA without its B, with the inputs EVA (arXiv 2410.07170)."""
    assert place.triples is not None, "the init says what it looks at"
    a = _columns(place.triples.v, torch.arange(place.rank), place.seed)
    return Factors(a.T, a.new_zeros(len(place.weight), place.rank))


def pissa(place: Place, knobs: Knobs) -> Factors:
    """The principal part of the weight itself (PiSSA, arXiv 2404.02948)."""
    a, b = low_rank(place.weight, place.rank)
    share = place.scaling**-0.5
    return _padded(Factors(share * a, share * b), place.rank)


def olora(place: Place, knobs: Knobs) -> Factors:
    """The first columns of Q and rows of R of the weight, `W = Q R` (OLoRA, arXiv 2406.01775)."""
    q, r = torch.linalg.qr(place.weight)
    return _padded(Factors(r[: place.rank], q[:, : place.rank]), place.rank)


def corda(place: Place, knobs: Knobs) -> Factors:
    """The part of the weight that does most to the inputs it sees (CorDA, arXiv 2406.05223, its instruction mode).

    With `C` the second moment of the inputs and `U S Vᵀ` the leading triples of `W C`, CorDA starts with `B = U √S` and
    `A = √S Vᵀ C⁻¹`. As `S Vᵀ C⁻¹ = Uᵀ W`, that is `A = √S⁻¹ Uᵀ W`, and no inverse is taken. How the product is shared
    depends in CorDA's code on the number of tokens; here both factors are of one size.
    """
    assert place.triples is not None, "the init says what it looks at"
    u, s, _ = place.triples.first(place.rank)
    root = (s / s[:1].clamp(min=torch.finfo(s.dtype).tiny)).clamp(min=torch.finfo(s.dtype).eps).sqrt()
    a, b = (u / root).T @ place.weight.to(u.dtype), u * root
    share = (b.norm() / a.norm().clamp(min=torch.finfo(s.dtype).tiny)) ** 0.5
    size = place.scaling**-0.5
    return _padded(Factors(size * share * a, size / share * b), place.rank)


def _columns(basis: Tensor, at: Tensor, seed: int) -> Tensor:
    """The columns `at` of `basis`, completed to orthonormal ones. Where there is no room for a column, the first that
    is not taken stands in for it, as long as there is one."""
    height, places = len(basis), at.tolist()
    if len(places) <= height:
        spare = iter(sorted(set(range(height)) - set(places)))
        places = [place if place < height else next(spare) for place in places]
    return completed(basis, max(places) + 1, seed)[:, places]


def _padded(factors: Factors, rank: int) -> Factors:
    """`factors` with zeros up to `rank`, in B alone where it can be so: a column that no row reads would not learn."""
    a, b = factors
    missing = rank - len(a)
    if missing <= 0:
        return factors
    more = completed(torch.linalg.qr(a.T).Q, rank, 0)[:, len(a) :].T
    return Factors(torch.cat([a, more]), torch.cat([b, b.new_zeros(len(b), missing)], 1))


def product_norm(a: Tensor, b: Tensor) -> float:
    """`‖B A‖`, by its `r` by `r` parts."""
    return float((b.T @ b * (a @ a.T)).sum().clamp(min=0).sqrt())


def _norms(factors: Factors) -> Tensor:
    """The singular values of the product of balanced factors."""
    return factors.b.norm(dim=0) * factors.a.norm(dim=1)


def _random_halves(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(2 * rank, generator=torch.Generator().manual_seed(seed))
    return order[:rank], order[rank:]


_DIRECTIONS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "ArB2r": lambda rank, _: (torch.arange(rank), torch.arange(rank, 2 * rank)),
    "A2rBr": lambda rank, _: (torch.arange(rank, 2 * rank), torch.arange(rank)),
    "ArBr": lambda rank, _: (torch.arange(1, 2 * rank, 2), torch.arange(0, 2 * rank, 2)),
    "random": _random_halves,
}
DIRECTIONS = tuple(_DIRECTIONS)
SCALES = ("auto", "stable", "gd", "unit", "weight-svd")


PLAIN = Knobs()
"""The choices that are made for who makes none."""

WORDS: dict[Kind, str] = {"gradient": "gradients", "inputs": "inputs", "outputs": "outputs"}
"""What an init may look at, for messages."""

INITS: dict[str, Init] = {
    "default": Init("A Kaiming uniform, B zero"),
    "gaussian": Init("A Gaussian, B zero", "gaussian"),
    "residual": Init("what quantization lost, by truncated SVD, weighted by the calibration data", start=residual),
    "lora-ga": Init("singular vectors of the gradient in A and B", factors=lora_ga, directions=2, offset=True),
    "lora-one": Init("one normalised step down the gradient", factors=lora_one, directions=1, searched=True),
    "gradient-a": Init("A reads the gradient's leading directions, B zero", factors=leading_a, directions=1),
    "eva": Init("A reads what the inputs vary along, B zero", factors=leading_a, directions=1, of="inputs"),
    "pissa": Init("the principal part of the weight", factors=pissa, offset=True),
    "olora": Init("the first rows and columns of the weight's QR", factors=olora, offset=True),
    "corda": Init("what the weight does most to its inputs", factors=corda, directions=1, of="outputs", offset=True),
}
"""Every init by its recipe name."""
