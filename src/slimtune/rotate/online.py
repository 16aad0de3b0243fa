"""Transforms that stay in the model: R4, a Hadamard transform of what the last linear of a feed-forward layer reads.

Activations behind a gate have the worst outliers of a model, and no linear before them could take the transform in. So
it runs in every forward pass, as a hook of whatever module stands at the port; its inverse is in that port's weight.
"""

from __future__ import annotations

from torch import Tensor, nn

from slimtune.arch import ModelMap, Port, Space
from slimtune.linalg.hadamard import transform
from slimtune.rotate.record import rotation_of


class OnlineTransform:
    """A forward pre-hook: the first argument of the module, transformed along its last dimension."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs in the dtype of the input."""
        return transform(args[0]), *args[1:]


def attach_online_(model: nn.Module, modelmap: ModelMap) -> tuple[Port, ...]:
    """Put the online transforms of a rotated model where they belong; returns the ports that have one.

    Needed again whenever modules were replaced: quantized, or wrapped by an adapter, whose factors read the transformed
    input too. Hooks that are there already, anywhere in the model, are taken away first.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, OnlineTransform)]:
            del hooks[key]
    basis = rotation_of(model)
    ports = tuple(port for port in modelmap.ports if port.reads is Space.FFN)
    if basis is None or "r4" not in basis.rotation.online:
        return ()
    for port in ports:
        model.get_submodule(port.name).register_forward_pre_hook(OnlineTransform(), prepend=True)
    return ports
