"""Lazy imports: names of a package are imported on first use, so that importing the package is fast.

The stub file ``__init__.pyi`` of a package lists each name once, as ``from .module import Name as Name``. Type checkers
and editors read it, and so does :func:`lazy_names`.
"""

from __future__ import annotations

import ast
from importlib.util import resolve_name
from pathlib import Path


def lazy_names(package: str, file: str) -> dict[str, str]:
    """Reads the stub of a package.

    Args:
        package: ``__name__`` of the package.
        file: ``__file__`` of the package.

    Returns:
        Public name -> full name of the module to import it from.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.level]
    home = {node: resolve_name("." * node.level + (node.module or ""), package) for node in imports}
    return {alias.name: home[node] for node in imports for alias in node.names}
