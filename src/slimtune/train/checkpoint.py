"""A `Trainer` whose checkpoints are whole or absent, small, and free of pickles.

transformers writes optimizer, scheduler and random states with `torch.save`, straight into their final place. Here one
safetensors file holds every tensor that training changes, one JSON file everything else, and the folder is renamed into
place when it is complete; a run killed at any moment resumes from the last whole checkpoint, bit for bit.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from slimtune.errors import FormatError
from slimtune.files import whole_folder

TENSORS, STATE, TRAINER_STATE = "state.safetensors", "state.json", "trainer_state.json"
TENSOR_KEY = "tensor"


def encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under names that begin with `name`. Undone by `decode`.

    >>> held: dict[str, Tensor] = {}
    >>> plain = encode({0: (torch.ones(2), 1.5, None)}, held, "optimizer")
    >>> sorted(held), decode(json.loads(json.dumps(plain)), held)[0][1:]
    (['optimizer.0.0'], (1.5, None))
    """
    if isinstance(value, Tensor):
        while name in tensors:  # of keys that look alike, such as 0 and "0"
            name += "'"
        tensors[name] = value.detach().contiguous().clone()
        return {TENSOR_KEY: name}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {"items": [[k, encode(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    return value


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `encode` took apart."""
    if not isinstance(value, dict):
        return value
    if TENSOR_KEY in value:
        return tensors[value[TENSOR_KEY]]
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "items" in value:
        return {k: decode(v, tensors) for k, v in value["items"]}
    if "tuple" in value:
        return tuple(decode(v, tensors) for v in value["tuple"])
    return [decode(v, tensors) for v in value["list"]]


class Stateful(Protocol):
    """What changes with training beside parameters and optimizer, and the model with it."""

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""

    def restore_(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, before the parameters are loaded."""


class CheckpointingTrainer(Trainer):
    """transformers' `Trainer` with the checkpoints described above (sharded runs keep transformers' own).

    `beside` is kept with them, where it is set.
    """

    beside: Stateful | None = None

    def train_from(self, checkpoint: Path | None) -> int:
        """Train to the end, from `checkpoint` on if there is one; returns the number of steps of the whole.

        transformers would do one more step from a checkpoint of the last.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                return state.global_step
        return self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).global_step

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_checkpoint(model, trial)
            return
        if not self.args.should_save:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None, "training has begun"
        tensors: dict[str, Tensor] = {}
        state = {
            "optimizer": encode(self.optimizer.state_dict(), tensors, "optimizer"),
            "scheduler": encode(self.lr_scheduler.state_dict(), tensors, "scheduler"),
            "random": encode(_random_state(), tensors, "random"),
        }
        if self.beside is not None:
            state["beside"] = encode(self.beside.state(), tensors, "beside")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensors[f"model.{name}"] = parameter.detach().contiguous()
        output = Path(str(self.args.output_dir))
        with whole_folder(output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}") as folder:
            save_file(tensors, folder / TENSORS)
            (folder / STATE).write_text(json.dumps(state))
            self.state.save_to_json(str(folder / TRAINER_STATE))
        rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (Path(resume_from_checkpoint) / TENSORS).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = _tensors(Path(resume_from_checkpoint))
        if self.beside is not None:
            self.beside.restore_(decode(_state(Path(resume_from_checkpoint))["beside"], tensors))
        for name, parameter in (model or cast(nn.Module, self.model)).named_parameters():
            if parameter.requires_grad:
                saved = tensors.get(f"model.{name}")
                if saved is None or saved.shape != parameter.shape:
                    raise FormatError(
                        "the checkpoint is of another model or adapter", where=resume_from_checkpoint, wanted=name
                    )
                parameter.data.copy_(saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / TENSORS).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None, "training has begun"
        state, tensors = _state(Path(checkpoint)), _tensors(Path(checkpoint))
        self.optimizer.load_state_dict(decode(state["optimizer"], tensors))
        self.lr_scheduler.load_state_dict(decode(state["scheduler"], tensors))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / TENSORS).is_file():
            super()._load_rng_state(checkpoint)
            return
        _restore_random_state(decode(_state(Path(checkpoint))["random"], _tensors(Path(checkpoint))))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, if there is one."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise FormatError("a training checkpoint is damaged", where=str(checkpoint), got=str(error)) from error
    return state


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / TENSORS)
    except (SafetensorError, OSError) as error:
        raise FormatError("a training checkpoint is damaged", where=str(checkpoint), got=str(error)) from error


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = np.random.get_state()  # noqa: NPY002 - whatever uses the legacy generator must resume too
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
