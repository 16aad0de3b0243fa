"""Running a model with one block of its weights in memory: each is loaded when the forward pass comes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from slimtune.kernels.memory import release

Slot = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""


def empty_slots(module: nn.Module) -> list[Slot]:
    """Where parameters of `module` are on `meta`."""
    return [(m, leaf) for m in module.modules() for leaf, p in m.named_parameters(recurse=False) if p.is_meta]


def empty_(slots: Iterable[Slot]) -> None:
    """Put the parameters at `slots` (back) on `meta`."""
    for module, leaf in slots:
        old = module.get_parameter(leaf)
        setattr(module, leaf, nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad))
    release()


@contextmanager
def on_demand(model: nn.Module, names: Iterable[str], materialise: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Within the block, the modules of `model` called `names` get their weights before they run, and give them back.

    `materialise` loads what a module (its second argument is its name) still has on `meta`. Whatever a module has in
    memory already stays there, so that one pass costs one reading of the files, and no more than one of the modules.
    """
    loaded: dict[str, list[Slot]] = {}

    def load(name: str, module: nn.Module, _: object) -> None:
        loaded[name] = empty_slots(module)
        materialise(module, name)

    def leave(name: str, *_: object) -> None:
        empty_(loaded.pop(name))

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(load, name), prepend=True))
        handles.append(module.register_forward_hook(partial(leave, name), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
