"""Calls a function right after a module of another library is imported, now or later.

The only hook that Python offers for this is a finder in ``sys.meta_path``. This one finds no modules by
itself, wraps only the loaders of the modules it waits for, and removes itself after the last of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


class ImportHook(MetaPathFinder):
    """Calls functions when modules are imported, or at once for modules that are imported already.

    Args:
        callbacks: full name of a module -> function to call with the module.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self._callbacks = dict(callbacks)
        self._finding: set[str] = set()
        sys.meta_path.insert(0, self)
        self.run_pending()

    def run_pending(self) -> None:
        """Calls the functions of modules that have been imported by now, even if not through this finder."""
        for name in list(self._callbacks):
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._imported(module)

    def remove(self) -> None:
        """Stops waiting."""
        self._callbacks.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of the other finders, with a loader that calls the function after loading."""
        if fullname not in self._callbacks or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithCallback(spec.loader, self._imported)
        return spec

    def _imported(self, module: ModuleType) -> None:
        callback = self._callbacks.pop(module.__name__, None)
        if not self._callbacks:
            self.remove()
        if callback is not None:
            callback(module)


class _LoaderWithCallback(Loader):
    """Wraps a loader, and calls a function when the module has been executed."""

    def __init__(self, loader: Any, callback: Callback) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._callback(module)
