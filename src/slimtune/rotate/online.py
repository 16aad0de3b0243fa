"""Transforms that stay in the model: R4, of what the last linear of a feed-forward layer reads, one of all heads that
the last linear of an attention reads, and, in place of R1, one of what other linears read.

Activations behind a gate have the worst outliers of a model, and heads differ in size; no linear before them could take
such a transform in. So it runs in every forward pass, as a hook of whatever module stands at the port; its inverse is
in that port's weight.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.arch import Port, bind
from slimtune.rotate.basis import online
from slimtune.rotate.record import rotation_of
from slimtune.rotate.turn import Turn


class OnlineTransform:
    """A forward pre-hook: the first argument of the module, turned in its own dtype.

    Modules that read the same tensor share one hook, and turn it once: what was turned is held, by the thread that runs
    them, until the last of `readers` has it.
    """

    def __init__(self, turn: Turn, readers: int = 1) -> None:
        self.turn, self.readers = turn, readers

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the module gets instead of `args`."""
        x, *rest = args
        if self.readers == 1 or torch.compiler.is_compiling() or x.is_inference():  # these have no version
            return self._turned(x), *rest
        before: _Turned | None = getattr(_held, "turned", None)
        if before is None or not before.is_of(self, x):
            before = _Turned(self, x, self._turned(x))
        before.left -= 1
        _held.turned = before if before.left else None
        return before.result, *rest

    def _turned(self, x: Tensor) -> Tensor:
        self.turn = self.turn.like(x)
        return self.turn(x)


class _Turned:
    """What a hook made of a tensor, as it was then, and how many readers do not have it yet."""

    def __init__(self, hook: OnlineTransform, x: Tensor, result: Tensor) -> None:
        self.key, self.result, self.left = self._key(hook, x), result, hook.readers

    def is_of(self, hook: OnlineTransform, x: Tensor) -> bool:
        """Whether `hook` would make the same of `x` now, gradients included."""
        return self.key[0]() is x and self.key[1:] == self._key(hook, x)[1:]

    @staticmethod
    def _key(hook: OnlineTransform, x: Tensor) -> tuple[Any, ...]:
        return weakref.ref(x), x._version, torch.is_grad_enabled(), hook


_held = threading.local()


def attach_online_(model: nn.Module) -> tuple[Port, ...]:
    """Put the online transforms of a rotated model, or of an adapter's base, where they belong; returns their ports.

    Needed again whenever modules were replaced: quantized, or wrapped by an adapter, whose factors read the transformed
    input too. Hooks that are there already, anywhere in the model, are taken away first.
    """
    detach_online_(model)
    basis, ports = rotation_of(model), list[Port]()
    if basis is None:
        return ()
    modelmap = bind(model)
    stages = [stage for block in modelmap.blocks for stage in block.stages]
    for stage in stages:
        turns = {port: turn for port in stage for turn in online(basis, port)}
        if turns:
            hook = OnlineTransform(next(iter(turns.values())), len(turns))  # ports of a stage read one input
            for port in turns:
                model.get_submodule(port.name).register_forward_pre_hook(hook, prepend=True)
            ports += turns
    return tuple(ports)


def detach_online_(model: nn.Module) -> None:
    """Take the online transforms out: what is left computes something else."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, OnlineTransform)]:
            del hooks[key]
