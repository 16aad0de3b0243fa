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
