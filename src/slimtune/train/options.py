"""The fields of a `train` step: transformers' and TRL's names, torch-free so that the command line can list them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from slimtune.errors import RecipeError
from slimtune.lora.options import FakeQuant

Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "inverse_sqrt"]


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Every name means what it means in `transformers.TrainingArguments` (`max_length`, `packing` and
    `completion_only_loss`: in TRL's `SFTConfig`)."""

    max_steps: int = field(default=-1, metadata={"help": "optimizer steps; -1: num_train_epochs decides"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the training data"})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "examples in a forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes in an optimizer step"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: Scheduler = field(default="cosine", metadata={"help": "shape of the learning rate"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "fraction of the steps that warm up"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping; 0: none"})
    optim: str = field(
        default="adamw_torch",
        metadata={"help": "lora-plus, lora-fa, riemannian, lora-rite, lora-pro, or a transformers name"},
    )
    max_length: int = field(default=512, metadata={"help": "tokens of an example at most"})
    packing: bool = field(default=False, metadata={"help": "several examples in a row, kept apart in attention"})
    completion_only_loss: bool = field(default=True, metadata={"help": "learn the answers, not the prompts"})
    distill: bool = field(default=False, metadata={"help": "learn from the model before it is pruned, not from labels"})
    distill_top_k: int = field(
        default=0, metadata={"help": "of the teacher, so many logits a token, found once; 0: it runs at every step"}
    )
    scales: bool = field(default=False, metadata={"help": "packed layers train their scales and signs, too"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations: less memory, slower"})
    keep_decoded: int = field(
        default=0, metadata={"help": "megabytes of decoded weights kept from forward to backward: faster"}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast"})
    fake_quant: FakeQuant | None = field(
        default=None, metadata={"help": "train the adapter as rounded: {weights: 4, activations: 4, warmup_steps: 20}"}
    )
    logging_steps: int = field(default=5, metadata={"help": "steps between log lines"})
    eval_steps: int = field(default=0, metadata={"help": "steps between held-out losses; 0: before and after only"})
    save_steps: int = field(default=50, metadata={"help": "steps between checkpoints for --resume"})
    report_to: str = field(default="none", metadata={"help": "a tracker transformers knows: tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        for name in (
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "logging_steps",
            "save_steps",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"{name} out of range", got=getattr(self, name), wanted="above 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise RecipeError("max_steps out of range", got=self.max_steps, wanted="above 0, or -1")
        if self.distill_top_k < 0 or (self.distill_top_k and not self.distill):
            wanted = "0 or more, with distill: true"
            raise RecipeError("distill_top_k out of range", got=self.distill_top_k, wanted=wanted)
        if self.max_length < 2:
            raise RecipeError("max_length out of range", got=self.max_length, wanted="at least 2")
        if not 0 <= self.warmup_ratio < 1:
            raise RecipeError("warmup_ratio out of range", got=self.warmup_ratio, wanted="0 to 1, 1 excluded")
        for name in ("eval_steps", "max_grad_norm", "weight_decay", "keep_decoded"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} out of range", got=getattr(self, name), wanted="0 or above")
