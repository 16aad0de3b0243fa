"""What happens beside training: one line of facts a logged step, and a stop when the loss is no longer a number."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.errors import TrainingDiverged
from slimtune.files import naming_full_disk, write_text
from slimtune.kernels.memory import PeakMemory

Progress = Callable[[dict[str, Any]], None]


class StepLog(TrainerCallback):
    """Appends every logged step to a JSONL file, and tells `progress` about it.

    A line is `{"train", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_rss_bytes",
    "seconds_left"}`; held-out losses are lines with `eval_loss`. `train` numbers the train steps of a recipe. On
    resuming, lines of steps that will be run again are dropped first.
    """

    def __init__(self, path: Path, train: int = 0, progress: Progress | None = None) -> None:
        self._path, self._train, self._progress = path, train, progress
        self._memory = PeakMemory()
        self.tokens = 0
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self._mark = (time.perf_counter(), 0, 0)

    def resume_at(self, step: int) -> None:
        """Forget lines beyond `step`, which will be written again."""
        if self._path.exists():
            whole, _, _ = self._path.read_text(encoding="utf-8").rpartition("\n")  # what follows was cut short
            lines = [json.loads(line) for line in whole.splitlines()]
            kept = [line for line in lines if line["train"] != self._train or line["step"] <= step]
            own = [line for line in kept if line["train"] == self._train]
            self.losses = {line["step"]: line["loss"] for line in own if "loss" in line}
            self.eval_losses = {line["step"]: line["eval_loss"] for line in own if "eval_loss" in line}
            self.tokens = max((line.get("tokens", 0) for line in own), default=0)
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock."""
        self._mark = (time.perf_counter(), self.tokens, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Log what is saved and the last step too: so a resumed log is the uninterrupted one, and no NaN slips by."""
        if control.should_save or state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the line; raise `TrainingDiverged` when the loss is not finite."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        _require_finite("training loss", loss, state.global_step)
        _require_finite("norm of the gradient", float(logs.get("grad_norm") or 0), state.global_step)
        now, (then, tokens, step) = time.perf_counter(), self._mark
        done = max(state.global_step - step, 1)
        self._mark = (now, self.tokens, state.global_step)
        self.losses[state.global_step] = loss
        self.write(
            {
                "step": state.global_step,
                "loss": loss,
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "tokens": self.tokens,
                "tokens_per_second": (self.tokens - tokens) / max(now - then, 1e-9),
                "peak_rss_bytes": self._memory.resident,
                "seconds_left": (state.max_steps - state.global_step) * (now - then) / done,
                "steps": state.max_steps,
            }
        )

    def write(self, facts: dict[str, Any]) -> None:
        """Append one line."""
        line = {"train": self._train, **facts}
        if "eval_loss" in facts:
            _require_finite("held-out loss", facts["eval_loss"], facts["step"])
            self.eval_losses[facts["step"]] = facts["eval_loss"]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with naming_full_disk(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._progress is not None:
            self._progress(line)


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the {what} is not a finite number",
            where=f"step {step}",
            got=value,
            remedy="lower learning_rate, set max_grad_norm: 1.0, or train with dtype: float32; the last checkpoint and "
            "the model before training are kept",
        )
