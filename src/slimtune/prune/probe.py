"""Gates on a model, and what is seen of its units while it runs.

A gate multiplies what a unit hands to the port that reads it: 1 for a unit that is there, 0 for one that is taken away
for the time being. `dL/dm` of a gate is `<dL/dW[:, j], W[:, j]>` summed over the unit's columns `j`: the exact
first-order change of the loss, got without a gradient of any weight and so on any base, packed or adapted. It is not
zero where the gate is, so a unit taken away by mistake can come back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Space
from slimtune.errors import CalibrationError, RecipeError
from slimtune.prune.groups import Axis, Part
from slimtune.prune.importance import Importance
from slimtune.prune.weights import base_layer, factors, part_of, shares

GATED = frozenset(("gate", "gate_squares"))
"""Statistics of units that say all by themselves: who needs no other is shown no weight."""

Normalise = Literal["none", "module", "axis"]
Scores = dict[str, Tensor]
"""A score for each unit of each axis, by the axis's name."""


def require_adapters(axes: Sequence[Axis], importance: Importance, adapted: Collection[str]) -> None:
    """Raise `RecipeError` where `importance` looks at the gradients of adapters, and no port of an axis that it looks
    at is among `adapted`: all its units would score 0."""
    if "lora_gradient" not in importance.needs:
        return
    for axis in axes:
        seen = [part.port for part in axis.parts if part.side in importance.looks_at]
        if seen and not any(port in adapted for port in seen):
            leaves = ", ".join(sorted({port.rpartition(".")[2] for port in seen}))
            raise RecipeError(
                "this importance looks at adapters' gradients, and no adapter is here",
                where=axis.name,
                wanted=f"an adapter on one of {leaves}",
                remedy=f"name one in lora's target_modules, leave {axis.kind} out of targets, or use importance: gate",
            )


class _Gate(torch.autograd.Function):
    """`x * m`, a gate for every `size` features; the gradient to each sequence's gates beside that to `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(*((x, mask) if ctx.needs_input_grad[1] else (None, mask)))
        ctx.shape = probe.shape
        return x.view_as(x) if mask is None else x * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, mask = ctx.saved_tensors
        to_gate = None
        if x is not None:
            sequences, units = ctx.shape
            product = (grads[0] * x).reshape(sequences, -1, units, x.shape[-1] // units)
            to_gate = product.sum((1, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return grads[0] if mask is None else grads[0] * mask, to_gate, None


class Probe:
    """Gates on every axis of `model`, and the scores of `importance` over the batches that run.

    Use as a context manager, or `remove` it at the end. `model` is a Hugging Face model without its `PeftModel`; the
    layers inside may be wrapped. For each batch run forward, and backward where the importance needs gradients, then
    `take` what was seen.

    Attributes:
        masks: 0 or 1 for each unit of each axis. Change them through `keep`.
        listening: whether what runs is looked at.
    """

    def __init__(
        self, model: nn.Module, modelmap: ModelMap, axes: Sequence[Axis], importance: Importance, seed: int = 0
    ) -> None:
        if "lora_gradient" in importance.needs:
            modules = {part.port: model.get_submodule(part.port) for axis in axes for part in axis.parts}
            require_adapters(axes, importance, [port for port, module in modules.items() if any(factors(module))])
        self.axes = {axis.name: axis for axis in axes if axis.parts}
        self.masks = {name: torch.ones(axis.units) for name, axis in self.axes.items()}
        self.listening = True
        self._model, self._importance = model, importance
        self.generator = torch.Generator().manual_seed(seed)
        self._open = False
        self._sequences = 1
        self._probes: dict[str, list[Tensor]] = {}
        self._moments: dict[Part, list[Tensor]] = {}
        self._reduced: dict[Part, list[Tensor]] = {}
        self._wide: dict[str, Tensor] = {}
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for axis in self.axes.values():
            for part in axis.readers:
                module = model.get_submodule(part.port)
                self._handles.append(module.register_forward_pre_hook(self._reader(axis, part)))
        if {"gradient", "lora_gradient"} & importance.needs:
            self._watch_weights(modelmap)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the gates off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Every gate open, and nothing looked at, inside the block: the model before it was pruned."""
        before = self._open, self.listening
        self._open, self.listening = True, False
        try:
            yield
        finally:
            self._open, self.listening = before

    def keep(self, name: str, units: Sequence[int]) -> None:
        """Close the gates of all units of the axis `name` but these."""
        mask = torch.zeros(self.axes[name].units)
        mask[list(units)] = 1
        self.masks[name] = mask
        self._wide.pop(name, None)

    def take(self, normalise: Normalise = "none") -> Scores:
        """The scores of what ran since the last time, and forget it.

        `module` brings the scores of each weight to length one before they are added, `axis` their sum.
        """
        scores = {name: self._score(axis, normalise == "module") for name, axis in self.axes.items()}
        if normalise == "axis":
            tiny = torch.finfo(torch.float64).tiny
            scores = {name: score / score.norm().clamp(min=tiny) for name, score in scores.items()}
        self._probes, self._moments, self._reduced = {}, {}, {}
        return scores

    def _score(self, axis: Axis, unit_length: bool) -> Tensor:
        total = torch.zeros(axis.units, dtype=torch.float64)
        gates = self._gates(axis)
        for part in axis.parts:
            if part.side in self._importance.looks_at:
                score = self._of_part(axis, part, gates).to(torch.float64).cpu()
                total += score / score.norm().clamp(min=torch.finfo(score.dtype).tiny) if unit_length else score
                if gates:
                    break  # the gates of an axis are one, however many ports read it
        return total

    def _of_part(self, axis: Axis, part: Part, gates: dict[str, Tensor]) -> Tensor:
        if "gradient" in self._importance.needs:
            return torch.stack(self._reduced[part]).mean(0)
        stats = dict(gates)
        if "second" in self._importance.needs:
            count, total, squares = self._moments[part]
            stats["mean"], stats["second"] = ((x / count).view(axis.units, part.size) for x in (total, squares))
        if "noise" in self._importance.needs:
            stats["noise"] = torch.rand(axis.units, generator=self.generator)
        if self._importance.needs and self._importance.needs <= GATED:
            return self._importance(torch.empty(axis.units, part.size, 0), stats)
        scores = []
        for units, weight, estimate in shares(self._model.get_submodule(part.port), part, axis.units):
            some = {name: value[units.start : units.stop] for name, value in stats.items()}
            some |= {name: some[name].to(weight.dtype) for name in ("mean", "second") if name in some}
            if "lora_gradient" in self._importance.needs:
                some["lora_gradient"] = torch.zeros_like(weight) if estimate is None else estimate
            scores.append(self._importance(weight, some))
        return torch.cat(scores)

    def _gates(self, axis: Axis) -> dict[str, Tensor]:
        """Mean and mean square over sequences of the gradient of an axis's gates."""
        if not GATED & self._importance.needs:
            return {}
        held = [self._probes.get(f"{axis.name}:{part.port}", []) for part in axis.readers]
        # Where activations are computed twice, the second time leaves a probe that backward never reaches.
        seen = [[probe.grad for probe in probes if probe.grad is not None] for probes in held]
        if not all(seen):
            raise CalibrationError("no gradient reached the gates of a layer", where=axis.name)
        gradients = torch.cat([torch.stack(batch).sum(0) for batch in zip(*seen, strict=True)])
        return {"gate": gradients.mean(0), "gate_squares": gradients.square().mean(0)}

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        self._sequences = 1 if tokens is None else len(cast(Tensor, tokens))

    def _reader(self, axis: Axis, part: Part) -> Any:
        def gate(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = args
            if self.listening and "second" in self._importance.needs:
                self._sum_up(part, x.detach())
            mask = None if self._open else self._mask(axis, part, x)
            if self.listening and torch.is_grad_enabled() and GATED & self._importance.needs:
                dtype = torch.promote_types(x.dtype, torch.float32)
                probe = torch.zeros(self._sequences, axis.units, dtype=dtype, device=x.device, requires_grad=True)
                self._probes.setdefault(f"{axis.name}:{part.port}", []).append(probe)
                return (cast(Tensor, _Gate.apply(x, probe, mask)), *rest)
            return args if mask is None else (x * mask, *rest)

        return gate

    def _mask(self, axis: Axis, part: Part, x: Tensor) -> Tensor | None:
        """The gates of every feature that `part` reads; None where all are open."""
        if axis.name not in self._wide:
            self._wide[axis.name] = self.masks[axis.name].repeat_interleave(part.size)
        wide = self._wide[axis.name]
        if wide.dtype != x.dtype or wide.device != x.device:
            wide = self._wide[axis.name] = wide.to(x.device, x.dtype)
        return None if bool(self.masks[axis.name].all()) else wide

    def _sum_up(self, part: Part, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        seen = [torch.tensor(float(len(x))), x.sum(0), x.square().sum(0)]
        held = self._moments.get(part)
        self._moments[part] = seen if held is None else [a + b for a, b in zip(held, seen, strict=True)]

    def _watch_weights(self, modelmap: ModelMap) -> None:
        """Let gradients reach the first block, and reduce each weight's gradient as soon as backward passes it."""
        for port in modelmap.ports:
            if port.kind == "embedding" and port.reads is Space.VOCAB:
                module = self._model.get_submodule(port.name)
                self._handles.append(module.register_forward_hook(_begin_graph))
        if "gradient" not in self._importance.needs:
            return
        by_port: dict[str, list[tuple[Axis, Part]]] = {}
        for axis in self.axes.values():
            for part in axis.parts:
                by_port.setdefault(part.port, []).append((axis, part))
        for name, parts in by_port.items():
            module = self._model.get_submodule(name)
            layer = base_layer(module)
            if isinstance(layer, nn.Embedding):
                for axis, part in parts:
                    self._reduced[part] = [torch.zeros(axis.units)]
            else:  # around its adapter, which may compute for both: the gradient to what is added up is one
                self._handles.append(module.register_forward_hook(self._watcher(layer, parts)))

    def _watcher(self, layer: nn.Module, parts: Sequence[tuple[Axis, Part]]) -> Any:
        def reduce(grad: Tensor, x: Tensor) -> None:
            sides = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            for axis, part in parts:
                scores = []
                for units, weight, _ in shares(layer, part, axis.units):
                    mine = part_of(sides[part.dim], part, units).T @ sides[1 - part.dim]
                    gradient = mine.to(weight.dtype).view(weight.shape)
                    scores.append(self._importance(weight, {"gradient": gradient}))
                self._reduced.setdefault(part, []).append(torch.cat(scores))

        def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.listening and output.requires_grad:
                x = args[0].detach()
                output.register_hook(lambda grad: reduce(grad, x))

        return watch


def _begin_graph(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
