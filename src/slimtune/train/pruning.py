"""Pruning along training: gates close by a schedule while an adapter learns, then what is behind them is cut away.

After every optimizer step the scores of all units are averaged (LoRAPrune's moving average); every few steps the units
to keep are chosen anew from all of them, so one that was closed by mistake opens again. When the ramp is over the
closed units are cut out, with the adapter's factors and the optimizer's state, and the rest of the training is faster;
where the unpruned model teaches, it is needed until the end, and the cut comes last. With `refit`, what is kept is
fitted to the outputs of the whole at every choice, always from the weights of the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.arch import bind
from slimtune.lora.attach import base_of
from slimtune.prune import IMPORTANCES, Importance
from slimtune.prune.groups import Kept, axes, parameters
from slimtune.prune.latency import latency
from slimtune.prune.options import PruneOptions
from slimtune.prune.probe import Probe, Scores
from slimtune.prune.refit import refit_
from slimtune.prune.schedule import ends_at, ratio_at
from slimtune.prune.select import select
from slimtune.prune.surgery import PruneFacts, PrunePlan, prune_, require_cuttable
from slimtune.prune.weights import base_layer

AVERAGE = 0.9
"""What the moving average of the scores keeps of itself at every step (LoRAPrune's)."""

POINTS = 8
"""Moments of a ramp, at most and beside its ends, at which the loss is measured."""


class Ramp(TrainerCallback):
    """Prunes `model` along its training by `options`.

    Attributes:
        facts: what was cut, once it was.
        kept: the units that stay, of those the model had at the start.
        history: the share of parameters behind closed gates, by training step.
        losses: what `measure` found, by training step: before the first choice and after some of them.
        times: what widths take, where scores are weighed against that.
        lost: the share of a reader's outputs that the last fitting lost, by its name.

        measure: takes the loss on held-out rows, where there are any.

    `windows` `[samples, length]` are the tokens to fit on.
    """

    def __init__(
        self,
        model: nn.Module,
        options: PruneOptions,
        *,
        last: bool = False,
        seed: int = 0,
        windows: Tensor | None = None,
    ) -> None:
        self._base, self._options, self._last = base_of(model), options, last
        self._modelmap = bind(model)
        self._axes = axes(self._modelmap, options.targets)  # type: ignore[arg-type]  # PruneOptions checked them
        require_cuttable(self._base, self._axes)
        self._importance: Importance = IMPORTANCES[options.importance]()
        self._whole = parameters(self._modelmap, options.of)
        self._scores: Scores = {}
        self._steps = 0
        self.kept: Kept = {axis.name: tuple(range(axis.units)) for axis in self._axes}
        self.facts: PruneFacts | None = None
        self.history: dict[int, float] = {}
        self.lost: dict[str, float] = {}
        self.losses: dict[int, float] = {}
        self.measure: Callable[[], float] | None = None
        self._windows = windows
        self._first: dict[str, list[Tensor]] = {}  # what readers were before they were fitted
        timed = options.per == "microsecond"
        self.times = latency(self._base, self._modelmap, self._axes, seed) if timed else None
        self.probe = Probe(self._base, self._modelmap, self._axes, self._importance, seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Learn how long the training is."""
        self._steps = state.max_steps
        if 0 not in self.losses and self.facts is None:
            self._look(0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the scores, while the gradients are there (clipped, as LoRAPrune's)."""
        if self.facts is not None:
            return
        for name, score in self.probe.take(self._options.normalise).items():
            held = self._scores.get(name)
            self._scores[name] = score if held is None else AVERAGE * held + (1 - AVERAGE) * score

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Choose anew every few steps and at the end of the ramp; then cut."""
        if self.facts is not None:
            return
        step, end = state.global_step, ends_at(self._options, self._steps)
        if step == end or (step < end and step % self._options.every == 0):
            self._choose(ratio_at(self._options, step, self._steps), final=step == end)
            self.history[step] = self._share()
            if step == end or (step // self._options.every) % -(-end // (self._options.every * POINTS)) == 0:
                self._look(step)
        if step == end and not self._last:
            self._cut(kwargs.get("optimizer"))

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Within the block, what runs is not looked at."""
        before, self.probe.listening = self.probe.listening, False
        try:
            yield
        finally:
            self.probe.listening = before

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Within the block the model is as it was: gates open, and readers with the weights of the beginning."""
        fitted = {name: self._data(name) for name in self._first}
        self._put(self._first)
        try:
            with self.probe.opened():
                yield
        finally:
            self._put(fitted)

    def finish(self) -> None:
        """Cut, where that was put off to the end; the gates are gone afterwards."""
        if self.facts is None:
            self._cut(None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the ramp."""
        return {
            "scores": self._scores,
            "kept": {name: torch.tensor(units) for name, units in self.kept.items()},
            "cut": self.facts is not None,
            "history": self.history,
            "generator": self.probe.generator.get_state(),
            "fitted": {name: self._data(name) for name in self.lost},
            "lost": self.lost,
            "losses": self.losses,
            "times": self.times,
        }

    def restore_(self, state: dict[str, Any]) -> None:
        """Go on from `state`: the gates, or the model that was cut."""
        self._scores, self.history = state["scores"], {int(k): v for k, v in state["history"].items()}
        self.kept = {name: tuple(units.tolist()) for name, units in state["kept"].items()}
        self.probe.generator.set_state(state["generator"])
        for name, units in self.kept.items():
            self.probe.keep(name, units)
        self.lost, self.losses = state["lost"], {int(k): v for k, v in state["losses"].items()}
        self.times = state["times"]
        self._first = {name: self._data(name) for name in self.lost}
        if state["cut"]:
            self._cut(None)
        self._put(state["fitted"])

    def _choose(self, ratio: float, *, final: bool) -> None:
        self.kept = select(
            self._modelmap,
            self._axes,
            self._scores,
            ratio * self._whole,
            step=self._options.multiple_of,
            additive=self._importance.additive,
            allocated=self._options.widths == "allocated",
            none=not final,
            latency=self.times,
        )
        for name, units in self.kept.items():
            self.probe.keep(name, units)
        if self._options.refit and self._windows is not None:
            self._fit(self._windows)

    def _look(self, step: int) -> None:
        if self.measure is not None:
            with self.deaf():
                self.losses[step] = self.measure()

    def _fit(self, windows: Tensor) -> None:
        if not self._first:
            readers = {part.port for axis in self._axes for part in axis.readers}
            self._first = {name: [data.clone() for data in self._data(name)] for name in sorted(readers)}
        with self.deaf():
            plan = PrunePlan(self._axes, self.kept)
            self.lost = refit_(self._base, self._modelmap, plan, windows, gates=self.probe, whole=self._first)

    def _data(self, name: str) -> list[Tensor]:
        """The parameters of a reader, weight first, without its adapter."""
        return [parameter.data for parameter in base_layer(self._base.get_submodule(name)).parameters()]

    def _put(self, values: dict[str, list[Tensor]]) -> None:
        for name, tensors in values.items():
            for parameter, data in zip(base_layer(self._base.get_submodule(name)).parameters(), tensors, strict=True):
                parameter.data = data.to(parameter.device)

    def _share(self) -> float:
        gone = sum(axis.parameters * (axis.units - len(self.kept[axis.name])) for axis in self._axes)
        return gone / self._whole

    def _cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.probe.remove()
        self._first = {}
        plan = PrunePlan(self._axes, self.kept, self._options.ratio, self._options.of)
        self.facts = prune_(self._base, self._modelmap, plan, optimizer=optimizer)
