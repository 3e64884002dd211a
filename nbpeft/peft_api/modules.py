"""Creates the modules of :mod:`nbpeft.peft_api.names` when they are imported, below any root name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from nbpeft._util.former_names import former_function
from nbpeft.names import PEFT_VERSION

_PACKAGE = __name__.partition(".")[0]
_FOLDER = os.path.dirname(os.path.dirname(__file__))
FILE = os.path.join(_FOLDER, "as_peft.py")
"""``__file__`` of the modules."""


class PeftModules:
    """A finder for PEFT's modules below one root, e.g. ``nbpeft.tuners.lora``; their names are resolved on first use.

    It does not derive from the classes of ``importlib.abc``, whose import takes a third as long as that of nbpeft.

    Args:
        root: name of the root package.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module that PEFT has; None for any other."""
        root, _, place = fullname.partition(".")
        if root != self.root:
            return None
        from nbpeft.peft_api.names import MODULES

        if place not in MODULES:
            return None
        spec = ModuleSpec(fullname, self, origin=FILE)  # type: ignore[arg-type]
        if any(children(place)):
            spec.submodule_search_locations = self.locations(place)
        return spec

    def locations(self, place: str) -> list[str]:
        """Returns the ``__path__`` of a package.

        Args:
            place: the package below the root, e.g. ``tuners.lora``.
        """
        return []

    def get_data(self, path: str) -> bytes:
        """Returns the content of a file, for ``pkgutil``, which looks in the folder of ``FILE``."""
        return Path(path).read_bytes()

    def get_resource_reader(self, fullname: str) -> _Resources | None:
        """Returns the reader of a package's files for ``importlib.resources``; only for the root."""
        return _Resources() if fullname == self.root else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns None, so that Python creates the module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Makes a module resolve its names on first use."""
        from nbpeft.peft_api.names import MODULES, NOT_IN_ROOT, names_in

        place = module.__name__.partition(".")[2]
        own = sys.modules[_PACKAGE] if not place else None

        def names() -> list[str]:
            found = set(names_in(place))
            # Without nbpeft's further names: "from peft import *" must not replace the caller's ``train``.
            if own:
                found.update({*own.__all__} & {name for other in MODULES for name in names_in(other)})
            return sorted(found - {"__version__"})

        def find(name: str) -> Any:
            if name == "__all__":
                return sorted({*names()} - {*NOT_IN_ROOT.split()}) if own else names()
            if name.startswith("__"):  # inspect looks these up in every module, even while torch is being imported
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(own, name) if own and name in own.__all__ else attribute(module.__name__, name)

        module.__doc__ = f"The names of PEFT's ``{'.'.join(filter(None, ('peft', place)))}``."
        module.__file__ = FILE
        module.__dict__.update(__getattr__=find, __dir__=lambda: sorted({*vars(module), *names()}))
        if own or place == "config":  # whose version PEFT's tests replace
            module.__dict__["__version__"] = PEFT_VERSION


class _Resources:
    """The files of nbpeft for ``importlib.resources``."""

    def files(self) -> Path:
        """Returns the folder."""
        return Path(_FOLDER)


def children(place: str) -> Iterator[tuple[str, bool]]:
    """Yields the modules in a package of PEFT: name, and whether it is a package itself.

    Args:
        place: the package below ``peft``, e.g. ``tuners.lora``; empty for ``peft`` itself.
    """
    from nbpeft.peft_api.names import MODULES

    inside = f"{place}.".lstrip(".")
    below = [other.removeprefix(inside) for other in MODULES if other.startswith(inside) and other != place]
    names = {name.partition(".")[0] for name in below}
    yield from ((name, any(other.startswith(f"{name}.") for other in below)) for name in sorted(names))


def attribute(module: str, name: str) -> Any:
    """Returns the value of a name in one of PEFT's modules: a submodule, or the implementation in nbpeft.

    Args:
        module: full name of the module, e.g. ``nbpeft.utils``.
        name: the name.

    Raises:
        AttributeError: there is no such name.
    """
    from nbpeft.peft_api.names import MODULES, value

    place = module.partition(".")[2]
    if f"{place}.{name}".lstrip(".") in MODULES:
        return importlib.import_module(f"{module}.{name}")
    try:
        return value(place, name)
    except KeyError:
        raise AttributeError(f"module {module!r} has no attribute {name!r}{former_function(name)}") from None


def add_import_paths() -> None:
    """Installs the finder for ``nbpeft.tuners.lora`` etc. at the end of ``sys.meta_path``: real modules come first."""
    if not any(isinstance(finder, PeftModules) and finder.root == _PACKAGE for finder in sys.meta_path):
        sys.meta_path.append(PeftModules(_PACKAGE))
