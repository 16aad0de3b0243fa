"""The fields of a `prune` step, torch-free so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slimtune.errors import RecipeError

TARGETS = ("kv", "heads", "ffn", "layers", "sublayers")
ALONE = {"layers", "sublayers"}


@dataclass(frozen=True)
class PruneOptions:
    """How much to prune, of what, when, and by which measure."""

    ratio: float = field(default=0.2, metadata={"help": "share of the parameters to remove"})
    of: Literal["blocks", "model"] = field(default="blocks", metadata={"help": "what the ratio is a share of"})
    importance: str = field(default="wanda", metadata={"help": "a name from `slimtune list importances`"})
    normalise: Literal["none", "module", "axis"] = field(
        default="none", metadata={"help": "scores as they are, or to length one in each weight, or in each sub-layer"}
    )
    targets: tuple[str, ...] = field(
        default=("kv", "ffn"), metadata={"help": "kv or heads, ffn; or layers, or sublayers, alone"}
    )
    multiple_of: int = field(default=8, metadata={"help": "kept FFN channels are a multiple of this"})
    widths: Literal["uniform", "allocated"] = field(
        default="uniform", metadata={"help": "all blocks alike, or by score per parameter (padded with zeros)"}
    )
    per: Literal["parameter", "microsecond"] = field(
        default="parameter", metadata={"help": "what scores are weighed against: parameters, or measured time"}
    )
    schedule: Literal["one-shot", "linear", "cubic"] = field(
        default="one-shot", metadata={"help": "at once, or along the train step that follows"}
    )
    every: int = field(default=10, metadata={"help": "training steps between prunings of a ramp"})
    warmup: float = field(default=0.1, metadata={"help": "fraction of the training before a ramp begins"})
    cooldown: float = field(default=0.1, metadata={"help": "fraction of the training after a ramp has ended"})
    refit: bool = field(
        default=False,
        metadata={"help": "fit what is kept to the outputs of what was there; on a ramp, at every choice"},
    )

    bias: bool = field(
        default=False,
        metadata={"help": "a bias for the mean of what goes (FLAP), where the model's configuration has a place"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise RecipeError("ratio out of range", where="ratio", got=self.ratio, wanted="between 0 and 1")
        if self.multiple_of < 1 or self.every < 1:
            name = "multiple_of" if self.multiple_of < 1 else "every"
            raise RecipeError(f"{name} out of range", where=name, got=getattr(self, name), wanted="at least 1")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown >= 1:
            got = f"warmup {self.warmup}, cooldown {self.cooldown}"
            raise RecipeError("no time is left to prune in", where="warmup", got=got, wanted="less than 1 in all")
        wrong = [target for target in self.targets if target not in TARGETS]
        depth = ALONE & set(self.targets)
        mixed = {"kv", "heads"} <= set(self.targets) or (depth and len(set(self.targets)) > 1)
        if wrong or mixed or not self.targets:
            raise RecipeError(
                "targets do not go together" if mixed else "unknown targets",
                where="targets",
                got=", ".join(self.targets) or "nothing",
                wanted="kv or heads, with or without ffn; or layers, or sublayers, alone",
            )
        if "sublayers" in self.targets and self.widths == "uniform":
            raise RecipeError(
                "no stock configuration says that a block has no attention, or no feed-forward layer",
                where="targets",
                got="sublayers",
                remedy="use widths: allocated (zeros in a file as large as before), or targets: layers",
            )
        if "layers" in self.targets and self.per == "microsecond":
            raise RecipeError("all layers take as long", where="per", got=self.per, remedy="leave it out")
        if (self.refit or self.bias) and depth:
            name = "refit" if self.refit else "bias"
            raise RecipeError(
                f"{name} fits what is kept of a sub-layer",
                where=name,
                got=f"targets: {', '.join(self.targets)}",
                remedy="use targets kv, heads or ffn",
            )
        if self.bias and self.ramped:
            got, remedy = f"schedule: {self.schedule}", "use schedule: one-shot, or leave bias out"
            raise RecipeError("biases are given at once", where="bias", got=got, remedy=remedy)
        if "layers" in self.targets and self.schedule != "one-shot":
            raise RecipeError("whole layers go at once", where="schedule", got=self.schedule, wanted="one-shot")

    @property
    def ramped(self) -> bool:
        """Whether pruning happens along the training that follows."""
        return self.schedule != "one-shot"
