"""Doing something right after another package's module is imported, without importing it.

`import slimtune` must be instant, and must make transformers know slimtune's folders. transformers has no entry points
for that, so slimtune waits for the module that holds its quantizer registry.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def register_when_imported(awaited: str, module: str, function: str) -> None:
    """Call `module.function()` once `awaited` is imported: now, if it is already."""
    if awaited in sys.modules:
        getattr(importlib.import_module(module), function)()
        return
    sys.meta_path.insert(0, _Watcher(awaited, module, function))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds one module by asking the other finders, and adds an act to its loading."""

    def __init__(self, awaited: str, module: str, function: str) -> None:
        self._awaited, self._module, self._function = awaited, module, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self._module, self._function)
        return spec


class _ActingLoader(importlib.abc.Loader):
    """A loader that acts when its module has been executed."""

    def __init__(self, loader: importlib.abc.Loader, module: str, function: str) -> None:
        self._loader, self._module, self._function = loader, module, function

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        getattr(importlib.import_module(self._module), self._function)()
