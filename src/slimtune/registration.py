"""Importing a module right after one of another package, without importing that.

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


def import_after(awaited: str, module: str) -> None:
    """Import `module` once `awaited` is: now, if that is already. It may also be `module` that imports `awaited`."""
    if awaited in sys.modules:
        importlib.import_module(module)
        return
    sys.meta_path.insert(0, _Watcher(awaited, module))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds one module by asking the other finders, and has another follow its loading."""

    def __init__(self, awaited: str, module: str) -> None:
        self._awaited, self._module = awaited, module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowedLoader(spec.loader, self._module)
        return spec


class _FollowedLoader(importlib.abc.Loader):
    """A loader that imports another module when its own has been executed."""

    def __init__(self, loader: importlib.abc.Loader, module: str) -> None:
        self._loader, self._module = loader, module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(self._module)
