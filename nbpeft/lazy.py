"""Packages whose names are imported when they are first used, so that importing the package costs nothing.

The stub beside a package's ``__init__.py`` holds each name once, as ``from .module import Name as Name``:
type checkers and editors read it, and so does :func:`lazy_names`.
"""

from __future__ import annotations

import ast
from pathlib import Path


def lazy_names(package: str, file: str) -> dict[str, str]:
    """Reads the stub of a package.

    Args:
        package: full name of the package, its ``__name__``.
        file: its ``__file__``.

    Returns:
        Public name -> full name of the module to import it from.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}
