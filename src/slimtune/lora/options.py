"""The fields of a `lora` step: PEFT's names, torch-free so that the command line can list them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from slimtune.errors import RecipeError

InitName = Literal[
    "default", "gaussian", "residual", "lora-ga", "lora-one", "gradient-a", "eva", "pissa", "olora", "corda"
]
ALL_OR_DEFAULT, DEFAULT_TOKENS = -1, 16_384
SKETCHING = ("lora-ga", "lora-one", "gradient-a", "eva", "corda")
"""The inits that look at a sketch."""


@dataclass(frozen=True)
class LoraOptions:
    """What adapter to add. Names without `init` in them are fields of PEFT's `LoraConfig`, `ranks` aside."""

    r: int = field(default=16, metadata={"help": "rank of the factors"})
    lora_alpha: float = field(default=32, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str | tuple[str, ...] = field(
        default="all-linear", metadata={"help": "all-linear, a list of names, or a regular expression"}
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r)"})
    ranks: Literal["uniform", "gradient"] = field(
        default="uniform",
        metadata={
            "help": "gradient: as many parameters, where they hold more of the gradient (eva: of the inputs' variance)"
        },
    )
    init: InitName = field(default="default", metadata={"help": "how the factors start: `slimtune list inits`"})
    init_direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = field(
        default="ArB2r", metadata={"help": "lora-ga: which singular vectors of the gradient go to A and to B"}
    )
    init_scale: Literal["auto", "stable", "gd", "unit", "weight-svd"] = field(
        default="auto", metadata={"help": "lora-ga: size of the start; auto: init_target, stable: the paper's"}
    )
    init_target: float = field(default=0.2, metadata={"help": "size of the start beside the weight, with auto"})
    init_gamma: float = field(
        default=0.0, metadata={"help": "divides the start; 0: the paper's (stable), searched (lora-one)"}
    )
    init_tokens: int = field(
        default=ALL_OR_DEFAULT,
        metadata={"help": "learnt tokens that are looked at; -1: 16,384, or all where there are fewer"},
    )
    init_passes: int = field(default=1, metadata={"help": "passes over them; more are more exact"})
    init_tolerance: float = field(
        default=0.0,
        metadata={"help": "stop before that when the overlap of two halves moves by less as they double; 0: do not"},
    )
    init_sketch: str = field(
        default="",
        metadata={
            "help": "file of the sketched gradients: read where it exists, else taken and written (beside the recipe)"
        },
    )
    pooled: bool = field(
        default=False, metadata={"help": "A sees the mean of each quantization group: merges exactly into zero points"}
    )
    init_residual: bool = field(
        default=False, metadata={"help": "also give back what quantization lost, as a frozen part of the adapter"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError("lora_dropout out of range", where="lora", got=self.lora_dropout, wanted="0 to 1")
        if self.ranks == "gradient" and self.init == "corda":
            raise RecipeError(
                "this init does not look at gradients", where="lora.ranks", got=self.init, remedy="use ranks: uniform"
            )
        if self.init_tokens != ALL_OR_DEFAULT and self.init_tokens < 1:
            raise RecipeError("init_tokens out of range", where="lora", got=self.init_tokens, wanted="above 0, or -1")
        if self.init_sketch and self.init not in SKETCHING and self.ranks == "uniform":
            raise RecipeError(
                "this init looks at no sketch", where="lora.init_sketch", got=self.init, wanted=", ".join(SKETCHING)
            )
        if self.pooled and (self.init not in ("default", "gaussian") or self.init_residual):
            raise RecipeError(
                "a pooled adapter starts from zero", where="lora", got=self.init, wanted="init: default or gaussian"
            )
        for name in ("r", "lora_alpha", "init_target", "init_passes"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"{name} out of range", where="lora", got=getattr(self, name), wanted="above 0")
        for name in ("init_gamma", "init_tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} out of range", where="lora", got=getattr(self, name), wanted="0 or above")
        if self.init_tolerance and self.init_passes > 1:
            raise RecipeError(
                "the first of several passes sees no overlap", where="lora.init_tolerance", remedy="set init_passes: 1"
            )


@dataclass(frozen=True)
class FakeQuant:
    """How an adapter trains on what will run: its merged weights and their inputs, rounded."""

    weights: int = field(default=4, metadata={"help": "bits of merged weights: 2 to 8; 16 leaves them alone"})
    activations: int = field(default=4, metadata={"help": "bits of inputs, per token: 2 to 8; 16 leaves them alone"})
    group_size: int = field(default=-1, metadata={"help": "input features that share a scale; -1: a whole row"})
    sym: bool = field(default=True, metadata={"help": "symmetric grids of weights"})
    activations_sym: bool = field(default=True, metadata={"help": "symmetric grids of inputs"})
    clip_ratio: float = field(default=1.0, metadata={"help": "fraction of an input's range that its grid spans"})
    warmup_steps: int = field(default=0, metadata={"help": "steps in 16 bit before rounding begins"})

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) not in (*range(2, 9), 16):
                raise RecipeError(f"{name} out of range", got=getattr(self, name), wanted="2 to 8, or 16 for none")
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError("group_size out of range", got=self.group_size, wanted="a positive number, or -1")
        if not 0 < self.clip_ratio <= 1:
            raise RecipeError("clip_ratio out of range", got=self.clip_ratio, wanted="above 0, to 1")
        if self.warmup_steps < 0:
            raise RecipeError("warmup_steps out of range", got=self.warmup_steps, wanted="0 or above")
