"""The modules of :mod:`nbpeft.peft_api.names`, made when they are imported, below any name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from nbpeft.names import PEFT_VERSION

_PACKAGE = __name__.partition(".")[0]
_FOLDER = os.path.dirname(os.path.dirname(__file__))
FILE = os.path.join(_FOLDER, "as_peft.py")
"""What the modules give as their file."""


class PeftModules:
    """Finds PEFT's modules below one name, as ``nbpeft.tuners.lora``; each resolves its names when they are used.

    It derives from nothing of ``importlib.abc``, whose import takes a third as long as that of nbpeft.

    Args:
        root: the name they are below.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that PEFT has, too; None for any other."""
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
        """The ``__path__`` of a package.

        Args:
            place: the package below the root, as ``tuners.lora``.
        """
        return []

    def get_data(self, path: str) -> bytes:
        """What a file holds; ``pkgutil`` looks for it in the folder of ``FILE``."""
        return Path(path).read_bytes()

    def get_resource_reader(self, fullname: str) -> _Resources | None:
        """What ``importlib.resources`` reads a package's files with; those of the root alone."""
        return _Resources() if fullname == self.root else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leaves it to Python to make the module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Gives a module its names."""
        from nbpeft.peft_api.names import names_in

        place = module.__name__.partition(".")[2]
        own = sys.modules[_PACKAGE] if not place else None

        def names() -> list[str]:
            return sorted({*names_in(place), *(own.__all__ if own else ())} - {"__version__"})

        def find(name: str) -> Any:
            if name == "__all__":
                return names()
            if name.startswith("__"):  # inspect asks every module, also while torch is being imported
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(own, name) if own and name in own.__all__ else attribute(module.__name__, name)

        module.__doc__ = f"The names of PEFT's ``{'.'.join(filter(None, ('peft', place)))}``."
        module.__file__ = FILE
        module.__dict__.update(__getattr__=find, __dir__=lambda: sorted({*vars(module), *names()}))
        if own:
            module.__dict__["__version__"] = PEFT_VERSION


class _Resources:
    """The files of nbpeft, for ``importlib.resources``."""

    def files(self) -> Path:
        """The folder."""
        return Path(_FOLDER)


def children(place: str) -> Iterator[tuple[str, bool]]:
    """Yields the modules in a package of PEFT: name, and whether it is a package itself.

    Args:
        place: the package below ``peft``, as ``tuners.lora``; empty for ``peft`` itself.
    """
    from nbpeft.peft_api.names import MODULES

    inside = f"{place}.".lstrip(".")
    below = [other.removeprefix(inside) for other in MODULES if other.startswith(inside) and other != place]
    names = {name.partition(".")[0] for name in below}
    yield from ((name, any(other.startswith(f"{name}.") for other in below)) for name in sorted(names))


def attribute(module: str, name: str) -> Any:
    """What PEFT has under a name in one of its modules: a module, or what nbpeft has for it.

    Args:
        module: full name of the module, as ``nbpeft.utils``.
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
        raise AttributeError(f"module {module!r} has no attribute {name!r}") from None


def add_import_paths() -> None:
    """Lets ``nbpeft.tuners.lora`` and the like be imported; this is looked at only where nothing else is found."""
    if not any(isinstance(finder, PeftModules) and finder.root == _PACKAGE for finder in sys.meta_path):
        sys.meta_path.append(PeftModules(_PACKAGE))
