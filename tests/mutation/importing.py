"""Imports modules with other code than their files have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from tests.mutation.scope import ROOT


class Importer(MetaPathFinder):
    """Finds modules whose code is given, whatever was compiled of them before.

    Args:
        codes: for each path below the root, what makes the module's code.
        root: where the files are.
    """

    def __init__(self, codes: Mapping[str, Callable[[], CodeType]], root: Path = ROOT) -> None:
        self._root = root
        self._codes = {module_name(path): (path, code) for path, code in codes.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's, if its code is given."""
        if fullname not in self._codes:
            return None
        source, code = self._codes[fullname]
        file = self._root / source
        places = [str(file.parent)] if file.name == "__init__.py" else None
        loader = _Loader(fullname, str(file), code)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=places)


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, code: Callable[[], CodeType]) -> None:
        super().__init__(fullname, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code()


def module_name(path: str) -> str:
    """The name by which a file below the root is imported."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
