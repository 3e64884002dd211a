"""``install_as_peft``: makes ``import peft`` import nbpeft, for scripts and for other libraries."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

from nbpeft.errors import NbpeftError
from nbpeft.names import PEFT_VERSION
from nbpeft.peft_api.modules import FILE, PeftModules, children

_CLIENTS = ("accelerate", "diffusers", "sentence_transformers", "transformers", "trl")
"""Packages that check on import whether PEFT is installed."""
_CACHED = ("is_peft_available", "is_peft_greater_or_equal")
"""Functions of transformers.utils.import_utils that cache their result."""
_lock = threading.RLock()
_finder: _PeftFinder | None = None
_undo = ExitStack()


def install_as_peft() -> ExitStack:
    """Makes ``import peft`` import nbpeft until ``uninstall_as_peft``, whether PEFT is installed or not.

    Every name of PEFT can be imported from its module in PEFT. Names that nbpeft does not implement raise an error when
    they are used. ``importlib.metadata.version("peft")`` works, and ``is_peft_available()`` of transformers, accelerate
    and TRL is true. A second call does nothing.

        nbpeft.install_as_peft()
        from peft import LoraConfig  # nbpeft's

    Diffusers checks for PEFT on import: if PEFT is not installed, import diffusers after this call.

    Returns:
        A context manager that uninstalls at its end, for ``with nbpeft.install_as_peft():``.

    Raises:
        NbpeftError: PEFT itself is already imported.
    """
    global _finder
    with _lock:
        if _finder is not None:
            return ExitStack()
        loaded = sys.modules.get("peft")
        if loaded is not None:
            raise NbpeftError(
                f"peft is already imported from {os.path.dirname(str(loaded.__file__))}, and its classes cannot be "
                "mixed with nbpeft's: call install_as_peft() in a new process, before anything imports peft",
                version=getattr(loaded, "__version__", None),
            )
        absent = "peft" in sys.modules or find_spec("peft") is None
        _undo.callback(sys.modules.update, _take_modules())
        _finder = _PeftFinder(installed=_is_installed())
        sys.meta_path.insert(0, _finder)
        sys.path_hooks.append(_Listing)
        with ExitStack() as until_end:
            until_end.callback(uninstall_as_peft)
            _clear_cached_results()
            if absent:
                _add_skipped_imports()
            return until_end.pop_all()


def uninstall_as_peft() -> None:
    """Undoes ``install_as_peft``: ``import peft`` imports PEFT again, if it is installed.

    Names that were imported in between still refer to nbpeft.
    """
    global _finder
    with _lock:
        if _finder is None:
            return
        sys.meta_path.remove(_finder)
        sys.path_hooks.remove(_Listing)
        for location in [entry for entry in sys.path_importer_cache if entry.startswith(FILE)]:
            del sys.path_importer_cache[location]
        _finder = None
        _take_modules()
        _undo.close()
        _clear_cached_results()


def _is_installed() -> bool:
    """Returns whether a PEFT distribution is installed, even if its import is blocked."""
    return next(iter(Distribution.discover(name="peft")), None) is not None


class _PeftFinder(PeftModules):
    """Finds ``peft``, its submodules and its metadata.

    Args:
        installed: whether PEFT itself is installed; then it is not listed a second time among all distributions.
    """

    def __init__(self, *, installed: bool) -> None:
        super().__init__("peft")
        self.installed = installed

    def locations(self, place: str) -> list[str]:
        """Returns paths that Python's own finder does not search, but ``_Listing`` recognizes; see ``PeftModules``."""
        return [os.path.join(FILE, *filter(None, place.split(".")))]

    def find_distributions(self, context: DistributionFinder.Context) -> Iterable[Distribution]:
        """Yields the distribution for the name that ``importlib.metadata`` looks for, or for a list of all."""
        if (context.name is None and not self.installed) or (context.name or "").lower() == "peft":
            yield _PeftDistribution()


class _Listing:
    """A path hook that lists the modules of ``peft`` and of its packages, for ``pkgutil``.

    Args:
        location: an entry of the ``__path__`` of a package.

    Raises:
        ImportError: the package is not one of ``peft``.
    """

    def __init__(self, location: str) -> None:
        if location != FILE and not location.startswith(FILE + os.sep):
            raise ImportError(f"{location} has no modules of peft", path=location)
        self.place = location.removeprefix(FILE).strip(os.sep).replace(os.sep, ".")

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> None:
        """Returns None: ``_PeftFinder``, which comes first in ``sys.meta_path``, has already found every module."""

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """Yields the name of each module, and whether it is a package."""
        yield from ((prefix + name, is_package) for name, is_package in children(self.place))


class _PeftDistribution(Distribution):
    """The metadata of ``peft`` for ``importlib.metadata``.

    The version is ``PEFT_VERSION``, or the minimum that the imported transformers requires if that is higher:
    transformers 5.24 requires PEFT 0.22, but does not use its new names.
    """

    def read_text(self, filename: str) -> str | None:
        wanted = getattr(sys.modules.get("transformers.integrations.peft"), "MIN_PEFT_VERSION", PEFT_VERSION)
        version = max(PEFT_VERSION, wanted, key=Version)
        lines = ["Metadata-Version: 2.1", "Name: peft", f"Version: {version}", "Summary: nbpeft under the name peft"]
        lines += [f"Requires-Dist: {wanted}" for wanted in _requirements()]
        return {"METADATA": "\n".join(lines) + "\n", "top_level.txt": "peft\n"}.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(__file__).parent / path


def _requirements() -> list[str]:
    """Returns the requirements of nbpeft; empty if it is not installed as a distribution."""
    with suppress(PackageNotFoundError):
        return requires(__name__.partition(".")[0]) or []
    return []


def _take_modules() -> dict[str, ModuleType]:
    """Removes ``peft`` and its submodules from the imported modules, including entries that block the import (None)."""
    names = [name for name in sys.modules if name.partition(".")[0] == "peft"]
    return {name: sys.modules.pop(name) for name in names}


def _clear_cached_results() -> None:
    """Clears what transformers has cached about the installed PEFT."""
    import_utils = sys.modules.get("transformers.utils.import_utils")
    for name in _CACHED:
        getattr(getattr(import_utils, name, None), "cache_clear", lambda: None)()


def _add_skipped_imports() -> None:
    """Sets names in imported modules of other libraries that skipped ``from peft import …`` as PEFT was not installed.

    The libraries check this once, when they are imported; their later code assumes that the names are there.
    """
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in _CLIENTS]:
        for statement in _peft_imports(getattr(module, "__file__", None)):
            for alias in statement.names:
                name = alias.asname or alias.name
                if name not in vars(module):
                    setattr(module, name, getattr(importlib.import_module(str(statement.module)), alias.name))
                    _undo.callback(vars(module).pop, name, None)


def _peft_imports(file: Any) -> Iterator[ast.ImportFrom]:
    """Yields the statements ``from peft... import ...`` that can run when a file is imported."""
    if not str(file).endswith(".py") or b"from peft" not in (source := Path(file).read_bytes()):
        return
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "peft" and not node.level:
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.expr):
            nodes.extend(ast.iter_child_nodes(node))
