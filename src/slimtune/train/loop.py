"""Training on transformers' `Trainer`: what slimtune adds is exact resumption, honest logs and a stop on NaN."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from slimtune.arch.weights import require_finite
from slimtune.calib.loss import chunked_loss
from slimtune.errors import RecipeError
from slimtune.lora.attach import base_of, quantized
from slimtune.lora.rounded import Switch, rounded_lora
from slimtune.prune.options import PruneOptions
from slimtune.prune.surgery import PruneFacts
from slimtune.quant.tuning import settle_tuning_, tune_, untunable
from slimtune.train.callbacks import Progress, StepLog
from slimtune.train.checkpoint import CheckpointingTrainer, last_checkpoint
from slimtune.train.data import Collator, Example
from slimtune.train.distill import distilled_loss, unpruned
from slimtune.train.optimizers import own_optimizer
from slimtune.train.options import TrainOptions
from slimtune.train.pruning import Ramp
from slimtune.train.scope import for_training
from slimtune.train.teacher import FILE, Teacher, visited, write_teacher

POINT_ROWS = 16
"""Held-out rows whose loss is measured along a ramp."""


@dataclass(frozen=True)
class TrainFacts:
    """What training did. Losses are nats per learnt token; the held-out ones are `None` without held-out examples.

    After a resumption `seconds` and `tokens_per_second` are of what was left to do, everything else is of the whole.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    tokens: int
    seconds: float
    tokens_per_second: float | None
    trainable_parameters: int
    prune: dict[str, object] | None = None
    scales_moved: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values for `report.json`."""
        return asdict(self)


class _CountingTrainer(CheckpointingTrainer):
    """Counts the tokens that were computed, padding excluded, for the log."""

    log_lines: StepLog
    ramp: Ramp | None = None
    distill: bool = False
    teacher: Teacher | None = None

    def log_to(self, lines: StepLog) -> None:
        """Log every step there."""
        self.log_lines = lines
        self.add_callback(lines)

    def prune_along(self, ramp: Ramp, distill: bool) -> None:
        """Prune while training, and learn from the unpruned model where `distill`."""
        self.ramp = self.beside = ramp
        self.distill = distill
        self.add_callback(ramp)

    def learn_from(self, teacher: Teacher) -> None:
        """Learn from what the unpruned model said, in place of running it."""
        self.teacher = teacher
        collator: Any = self.data_collator

        def numbered(rows: Sequence[tuple[int, Example]]) -> dict[str, Any]:
            return {**collator([example for _, example in rows]), "rows": torch.tensor([row for row, _ in rows])}

        self.train_dataset = cast(Any, list(enumerate(cast(_Examples, self.train_dataset).examples)))
        self.data_collator = numbered

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Factors of scales and signs begin with 1, and do not decay to 0."""
        return [name for name in super().get_decay_parameter_names(model) if ".tuning." not in name]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        self.log_lines.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        base = base_of(self.accelerator.unwrap_model(model))
        if self.teacher is not None:
            said = self.teacher.of(inputs.pop("rows").tolist(), inputs["input_ids"].device)
            return distilled_loss(model, base, said, inputs, num_items_in_batch)
        if self.distill and self.ramp is not None:
            teacher = unpruned(cast(PeftModel, self.accelerator.unwrap_model(model)), self.ramp, inputs)
            return distilled_loss(model, base, teacher, inputs, num_items_in_batch)
        with nullcontext() if return_outputs else chunked_loss(base):  # who wants outputs wants true logits
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class _HeldOut(TrainerCallback):
    """Measures the held-out loss every so many steps."""

    def __init__(self, lines: StepLog, measure: Callable[[], float], every: int) -> None:
        self._lines, self._measure, self._every = lines, measure, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self._every == 0:
            self._lines.write({"step": state.global_step, "eval_loss": self._measure()})


class _WarmUp(TrainerCallback):
    """Lets rounding wait for so many steps."""

    def __init__(self, switch: Switch, steps: int) -> None:
        self._switch, self._steps = switch, steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._switch.on = state.global_step >= self._steps


def finetune(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    options: TrainOptions,
    *,
    held_out: Sequence[Example] = (),
    seed: int = 0,
    log: Path | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    number: int = 0,
    progress: Progress | None = None,
    prune: PruneOptions | None = None,
    windows: Tensor | None = None,
) -> TrainFacts:
    """Train what is trainable in `model` on `examples`, in place.

    Args:
        model: a `PeftModel`, or a dense Hugging Face model (then all of it trains).
        examples: tokenised examples with their loss masks.
        collator: makes a batch of them.
        options: the fields of a `train` step.
        held_out: examples whose loss is measured before and after.
        seed: of the order of the data and of dropout.
        log: the JSONL file to append to.
        checkpoints: where checkpoints go (nowhere when absent).
        resume: continue from the last whole checkpoint there, bit for bit as if never interrupted.
        number: which train step of the recipe this is, for the log.
        progress: called with every logged line.
        prune: prune along the training, and cut at the end of the ramp.
        windows: tokens `[samples, length]` on which `prune.refit` fits.

    Raises `TrainingDiverged` when the loss is not finite, `FormatError` when a weight is not to begin with, and
    `RecipeError` when nothing is trainable.
    """
    trainable = _trainable(model, options)
    rounding = nullcontext() if options.fake_quant is None else rounded_lora(model, options.fake_quant)
    with tempfile.TemporaryDirectory() as scratch, for_training(model, options), rounding as switch:
        folder = checkpoints or Path(scratch)
        start = last_checkpoint(folder) if resume else None
        examples = visited(examples, options, seed) if options.distill_top_k else examples
        lines = StepLog(log or Path(scratch) / "log.jsonl", number, progress)
        trainer = _trainer(model, examples, collator, options, folder, seed, save=checkpoints is not None)
        trainer.log_to(lines)
        ramp = _ramp(trainer, model, prune, options, seed, windows)
        _along(trainer, ramp, held_out, collator, options, folder / FILE, resume)
        if switch is not None and options.fake_quant is not None:
            trainer.add_callback(_WarmUp(switch, options.fake_quant.warmup_steps))
        lines.resume_at(int(start.name.rsplit("-", 1)[1]) if start else -1)
        measure = partial(_measured, ramp, model, held_out, collator, options.per_device_train_batch_size)
        if held_out and 0 not in lines.eval_losses:
            lines.write({"step": 0, "eval_loss": measure()})
        if held_out and options.eval_steps:
            trainer.add_callback(_HeldOut(lines, measure, options.eval_steps))
        set_seed(seed)
        before, clock = lines.tokens, time.perf_counter()
        steps = trainer.train_from(start)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # what follows is not in bfloat16 autocast
        seconds = time.perf_counter() - clock
        if ramp is not None:
            ramp.finish()
        if held_out and steps not in lines.eval_losses:
            lines.write({"step": steps, "eval_loss": measure()})
    moved = settle_tuning_(model) if options.scales else None
    model.eval()
    losses = [lines.losses[step] for step in sorted(lines.losses)]
    return TrainFacts(
        steps=steps,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        eval_loss_before=lines.eval_losses.get(0),
        eval_loss_after=lines.eval_losses.get(steps),
        tokens=lines.tokens,
        seconds=seconds,
        tokens_per_second=(lines.tokens - before) / seconds if lines.tokens > before else None,
        trainable_parameters=trainable,
        prune=None if ramp is None or ramp.facts is None else _pruned(ramp, ramp.facts),
        scales_moved=moved,
    )


def _ramp(
    trainer: _CountingTrainer,
    model: nn.Module,
    prune: PruneOptions | None,
    options: TrainOptions,
    seed: int,
    windows: Tensor | None,
) -> Ramp | None:
    """What prunes along the training that `trainer` does."""
    if prune is None:
        return None
    padded = prune.widths == "allocated"  # what is left behind zeros would learn again, without its gate
    asked = options.distill and not options.distill_top_k
    ramp = Ramp(model, prune, last=asked or padded, seed=seed, windows=windows)
    trainer.prune_along(ramp, options.distill)
    return ramp


def _along(
    trainer: _CountingTrainer,
    ramp: Ramp | None,
    held_out: Sequence[Example],
    collator: Collator,
    options: TrainOptions,
    path: Path,
    resume: bool,
) -> None:
    """What goes with a ramp: the loss on a few held-out rows, and what its teacher says, kept in the file `path`."""
    if ramp is None:
        return
    model, size = cast(PeftModel, trainer.model), options.per_device_train_batch_size
    if held_out:
        ramp.measure = partial(heldout_loss, model, held_out[:POINT_ROWS], collator, size)
    if options.distill_top_k:
        examples = cast(_Examples, trainer.train_dataset).examples
        if not (resume and path.is_file()):
            write_teacher(path, model, partial(unpruned, model, ramp), examples, collator, options.distill_top_k, size)
        trainer.learn_from(Teacher(path, base_of(model), examples, options.distill_top_k))


def _trainable(model: nn.Module, options: TrainOptions) -> int:
    """How many numbers train, scales among them where `options` want that; the model can learn as they say."""
    require_finite(model)
    if options.scales and not tune_(model):
        remedy = untunable([layer.layout for layer in quantized(model)])
        raise RecipeError("there are no scales to train", where="scales", remedy=remedy)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise RecipeError("nothing in the model is trainable", remedy="put a lora step before train")
    return trainable


def _pruned(ramp: Ramp, facts: PruneFacts) -> dict[str, object]:
    kept = {name: list(units) for name, units in ramp.kept.items()}
    lost = {"lost": [{"name": name, "share": share} for name, share in ramp.lost.items()]} if ramp.lost else {}
    return {
        **facts.to_dict(),
        **lost,
        "kept": kept,
        "history": {str(step): share for step, share in ramp.history.items()},
        "losses": {str(step): loss for step, loss in ramp.losses.items()},
        **({"latency": ramp.times} if ramp.times else {}),
    }


def _measured(ramp: Ramp | None, *arguments: Any) -> float:
    """The held-out loss, unseen by a ramp."""
    with nullcontext() if ramp is None else ramp.deaf():
        return heldout_loss(*arguments)


@torch.no_grad()
def heldout_loss(model: nn.Module, examples: Sequence[Example], collator: Collator, batch_size: int) -> float:
    """Mean loss, in nats per learnt token, over all tokens of `examples`. The model's mode and random state stay."""
    training = model.training
    model.eval()
    device = next(p.device for p in model.parameters())
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = {k: v.to(device) for k, v in collator(examples[start : start + batch_size]).items()}
        labels = batch["labels"]
        shift = 0 if cast(Any, model).config.is_encoder_decoder else 1
        learnt = int((labels[:, shift:] != -100).sum())
        if learnt:
            with chunked_loss(base_of(model)):
                total += float(model(**batch, use_cache=False).loss) * learnt
            count += learnt
    model.train(training)
    return total / count if count else float("nan")


def _trainer(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    options: TrainOptions,
    folder: Path,
    seed: int,
    *,
    save: bool,
) -> _CountingTrainer:
    optimizer = own_optimizer(model, options)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.max_steps,
        num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=options.per_device_train_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_ratio,  # transformers >= 5: a fraction below 1 is a ratio
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=options.optim if optimizer is None else "adamw_torch",
        bf16=options.bf16,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save else "no",
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to=options.report_to,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = _CountingTrainer(
        model=cast(Any, model),
        args=arguments,
        train_dataset=cast(Any, _Examples(examples)),
        data_collator=cast(Any, collator),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Examples(torch.utils.data.Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
