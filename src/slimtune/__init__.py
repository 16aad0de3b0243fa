"""slimtune: make a language model small and fine-tune it, from one recipe.

What a recipe can do, these functions can. Nothing heavy is imported until one of them is used, and importing slimtune
makes transformers know slimtune's model folders: `AutoModelForCausalLM.from_pretrained(run / "model")` just works.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slimtune.registration import import_after

__version__ = "0.1.0"

if TYPE_CHECKING:
    from slimtune.recipe.api import (
        DataSource,
        add_lora,
        evaluate,
        export,
        finetune,
        load,
        merge,
        plan,
        prune,
        quantize,
        rotate,
        rotate_adapter,
        rotate_folder,
        run,
        sketch,
    )

__all__ = [
    "DataSource",
    "__version__",
    "add_lora",
    "evaluate",
    "export",
    "finetune",
    "load",
    "merge",
    "plan",
    "prune",
    "quantize",
    "rotate",
    "rotate_adapter",
    "rotate_folder",
    "run",
    "sketch",
]


class _Package(ModuleType):
    """This module's class. Once a subpackage is imported, Python gives its name here to it, whatever stood there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


class _Callable(ModuleType):
    """A subpackage that is also the function of its name, as `slimtune.evaluate`, `export` and `prune` are."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = getattr(importlib.import_module("slimtune.recipe.api"), self.__name__.rpartition(".")[2])
        return function(*args, **options)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("slimtune.recipe.api"), name)
    raise AttributeError(f"module 'slimtune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


import_after("transformers.quantizers.auto", "slimtune.hub")
"""Importing transformers here would take seconds; instead slimtune registers when transformers' registry is loaded."""
