"""The fields of a `lora` step: PEFT's names, torch-free so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slimtune.errors import RecipeError


@dataclass(frozen=True)
class LoraOptions:
    """What adapter to add. Every name but `init` is a field of PEFT's `LoraConfig`."""

    r: int = field(default=16, metadata={"help": "rank of the factors"})
    lora_alpha: float = field(default=32, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str | tuple[str, ...] = field(
        default="all-linear", metadata={"help": "all-linear, a list of names, or a regular expression"}
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r)"})
    init: Literal["default", "gaussian", "residual"] = field(
        default="default", metadata={"help": "how the factors start; residual: from what quantization lost"}
    )

    def __post_init__(self) -> None:
        if self.r < 1:
            raise RecipeError("r out of range", where="lora", got=self.r, wanted="a positive number")
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError("lora_dropout out of range", where="lora", got=self.lora_dropout, wanted="0 to 1")
        if self.lora_alpha <= 0:
            raise RecipeError("lora_alpha out of range", where="lora", got=self.lora_alpha, wanted="above 0")


@dataclass(frozen=True)
class FakeQuant:
    """How an adapter trains on what will run: its merged weights and their inputs, rounded."""

    weights: int = field(default=4, metadata={"help": "bits of merged weights: 2 to 8; 16 leaves them alone"})
    activations: int = field(default=4, metadata={"help": "bits of inputs, per token: 2 to 8; 16 leaves them alone"})
    group_size: int = field(default=-1, metadata={"help": "input features that share a scale; -1: a whole row"})
    sym: bool = field(default=True, metadata={"help": "symmetric grids of weights"})
    activations_sym: bool = field(default=True, metadata={"help": "symmetric grids of inputs"})
    warmup_steps: int = field(default=0, metadata={"help": "steps in 16 bit before rounding begins"})

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) not in (*range(2, 9), 16):
                raise RecipeError(f"{name} out of range", got=getattr(self, name), wanted="2 to 8, or 16 for none")
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError("group_size out of range", got=self.group_size, wanted="a positive number, or -1")
        if self.warmup_steps < 0:
            raise RecipeError("warmup_steps out of range", got=self.warmup_steps, wanted="0 or above")
