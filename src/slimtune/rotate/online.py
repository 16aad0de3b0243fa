"""Transforms that stay in the model: R4, of what the last linear of a feed-forward layer reads, and one of all heads
that the last linear of an attention reads.

Activations behind a gate have the worst outliers of a model, and heads differ in size; no linear before them could take
such a transform in. So it runs in every forward pass, as a hook of whatever module stands at the port; its inverse is
in that port's weight.
"""

from __future__ import annotations

from torch import Tensor, nn

from slimtune.arch import Port, bind
from slimtune.rotate.basis import online
from slimtune.rotate.record import rotation_of
from slimtune.rotate.turn import Turn


class OnlineTransform:
    """A forward pre-hook: the first argument of the module, turned in its own dtype."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the module gets instead of `args`."""
        self.turn = self.turn.like(args[0])
        return self.turn(args[0]), *args[1:]


def attach_online_(model: nn.Module) -> tuple[Port, ...]:
    """Put the online transforms of a rotated model, or of an adapter's base, where they belong; returns their ports.

    Needed again whenever modules were replaced: quantized, or wrapped by an adapter, whose factors read the transformed
    input too. Hooks that are there already, anywhere in the model, are taken away first.
    """
    detach_online_(model)
    basis, ports = rotation_of(model), []
    if basis is None:
        return ()
    for port in bind(model).ports:
        for turn in online(basis, port):
            model.get_submodule(port.name).register_forward_pre_hook(OnlineTransform(turn), prepend=True)
            ports.append(port)
    return tuple(ports)


def detach_online_(model: nn.Module) -> None:
    """Take the online transforms out: what is left computes something else."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, OnlineTransform)]:
            del hooks[key]
