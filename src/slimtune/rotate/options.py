"""The fields of a `rotate` step, torch-free so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slimtune.errors import RecipeError

ONLINE = ("r4",)
"""Transforms that can run in the model: `r4` before the last linear of a feed-forward layer."""


@dataclass(frozen=True)
class Rotation:
    """Which rotation: its construction, and the seed of what is random in it.

    `hadamard` is a transform of `slimtune.linalg.hadamard` with random signs (QuaRot, arXiv 2404.00456), `orthogonal` a
    random orthogonal matrix.
    """

    kind: Literal["hadamard", "orthogonal"] = field(
        default="hadamard", metadata={"help": "hadamard with random signs, or orthogonal: a random matrix"}
    )
    seed: int = field(default=0, metadata={"help": "of the random signs or matrix"})
    online: tuple[str, ...] = field(
        default=(), metadata={"help": "transforms left in the model, which only slimtune runs: r4"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RecipeError("seed out of range", where="seed", got=self.seed, wanted="0 to 4294967295")
        unknown = [name for name in self.online if name not in ONLINE]
        if unknown:
            raise RecipeError("there is no such online transform", where="online", got=unknown[0], wanted=", ".join(ONLINE))
