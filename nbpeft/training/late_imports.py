"""Runs something right after a module of another library is imported, now or later.

Python has no other place for that than a finder in ``sys.meta_path``. This one finds nothing by
itself, wraps only the modules it waits for, and takes itself out after the last of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]


class LateImports(MetaPathFinder):
    """Waits for modules. Those that are imported already are served at once.

    Args:
        then: full name of a module -> what to call with it once it is imported.
    """

    def __init__(self, then: Mapping[str, Then]) -> None:
        self._then = dict(then)
        self._finding: set[str] = set()
        sys.meta_path.insert(0, self)
        self.serve()

    def serve(self) -> None:
        """Serves modules that are imported by now, however they came."""
        for name in list(self._then):
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._imported(module)

    def stop(self) -> None:
        """Waits no more."""
        self._then.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with a loader that tells when it is done."""
        if fullname not in self._then or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _TellingLoader(spec.loader, self._imported)
        return spec

    def _imported(self, module: ModuleType) -> None:
        then = self._then.pop(module.__name__, None)
        if not self._then:
            self.stop()
        if then is not None:
            then(module)


class _TellingLoader(Loader):
    """Another loader, and a call when the module has been executed."""

    def __init__(self, loader: Any, done: Then) -> None:
        self._loader = loader
        self._done = done

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._done(module)
