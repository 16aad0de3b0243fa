"""The fields of a `rotate` step, torch-free so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from slimtune.errors import RecipeError

FOLDED = frozenset({"inputs", "r4", "heads"})
"""Online transforms whose inverse is in a weight: an engine that does not run them computes something else."""

ONLINE = ("inputs", "r3", "r4", "heads")
"""Transforms that can run in the model: `inputs` before every linear of a block that reads the residual stream, which
then stays as it is (there is no R1), `r3` of queries and keys, where a cache of keys is rounded and nowhere else
(`slimtune.hub`), `r4` before the last linear of a feed-forward layer, `heads` across all heads before the last linear
of an attention (inside of each head R2 does the same at no cost)."""


@dataclass(frozen=True)
class Rotation:
    """Which rotation: its construction, and the seed of what is random in it.

    `hadamard` is a transform of `slimtune.linalg.hadamard` with random signs (QuaRot, arXiv 2404.00456), `orthogonal` a
    random orthogonal matrix, `learned` one that was learnt from activations (`slimtune.rotate.learn`).
    """

    least_seed: ClassVar[int] = 0

    kind: Literal["hadamard", "orthogonal", "learned"] = field(
        default="hadamard", metadata={"help": "hadamard with random signs, orthogonal: a random matrix, or learned"}
    )
    seed: int = field(default=0, metadata={"help": "of the random signs or matrix"})
    steps: int = field(default=100, metadata={"help": "of the descent, where the rotation is learned"})
    online: tuple[str, ...] = field(
        default=(),
        metadata={"help": "what only slimtune runs: inputs (instead of R1), r3 (for a kv_cache), r4, heads"},
    )
    balance: bool = field(
        default=False,
        metadata={"help": "scale channels so that what rounding inputs and weights loses is least; needs calibration"},
    )
    block_size: int = field(
        default=0,
        metadata={"help": "channels that r4 turns together; 0: all. A power of two (128) can leave as `vllm`"},
    )

    @property
    def calibrated(self) -> bool:
        """Whether there is something to find on calibration text."""
        return self.balance or self.kind == "learned"

    @property
    def folds(self) -> bool:
        """Whether the residual stream turns, where the model allows it (R1)."""
        return "inputs" not in self.online

    @property
    def leaves(self) -> bool:
        """Whether another engine can run what is left in the model: r4 in Sylvester's blocks, and nothing else."""
        return FOLDED.intersection(self.online) == {"r4"} and self.block_size.bit_count() == 1

    def __post_init__(self) -> None:
        if not self.least_seed <= self.seed < 2**32:
            wanted = f"{self.least_seed} to 4294967295"
            raise RecipeError("seed out of range", got=self.seed, wanted=wanted)
        if self.steps < 1:
            raise RecipeError("steps out of range", got=self.steps, wanted="at least 1")
        unknown = [name for name in self.online if name not in ONLINE]
        if unknown:
            raise RecipeError("no such online transform", where="online", got=unknown[0], wanted=", ".join(ONLINE))
        if self.block_size < 0 or self.block_size == 1 or (self.block_size and "r4" not in self.online):
            wanted = "at least 2, with online: [r4]"
            raise RecipeError("block_size is of r4", where="block_size", got=self.block_size, wanted=wanted)
