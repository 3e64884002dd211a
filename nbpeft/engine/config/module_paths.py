"""Matching of names and patterns against the end of module paths."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from nbpeft.engine.config.patterns import ENDING

PLAIN_PATTERN = re.compile(r"\^?[\w.]+")
"""A pattern that is just a name, or with ``^`` a full path."""


class PatternTable:
    """A mapping from patterns to values; the value for a path is that of the first pattern that matches its end.

    A pattern is a regular expression for whole trailing segments of a path, as in PEFT. Patterns that consist only of
    names and dots are looked up in a dictionary, which takes O(segments) for any number of patterns.

    Args:
        patterns: pattern -> value, in order of precedence.
    """

    def __init__(self, patterns: dict[str, Any]) -> None:
        self.patterns = dict(patterns)
        self._plain: dict[str, int] = {}
        self._regular: list[tuple[int, re.Pattern[str]]] = []
        for order, pattern in enumerate(self.patterns):
            if PLAIN_PATTERN.fullmatch(pattern):
                self._plain.setdefault(pattern, order)
            else:
                self._regular.append((order, re.compile(ENDING.format(pattern))))
        self._values = list(self.patterns.values())

    def get(self, path: str, default: Any) -> Any:
        """The value of the first pattern that matches ``path``, or ``default``."""
        if not self._values:
            return default
        found = [self._plain[name] for name in (f"^{path}", *suffixes(path)) if name in self._plain]
        best = min(found, default=len(self._values))
        for order, pattern in self._regular:
            if order >= best:
                break
            if pattern.match(path):
                best = order
        return default if best == len(self._values) else self._values[best]

    def unused(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Patterns that match none of the paths; one that matches but comes after another match counts as used."""
        if not self._values:
            return ()
        known = list(paths)
        endings = {name for path in known for name in (f"^{path}", *suffixes(path))}
        used = {order for pattern, order in self._plain.items() if pattern in endings}
        used.update(order for order, pattern in self._regular if any(pattern.match(path) for path in known))
        return tuple(pattern for order, pattern in enumerate(self.patterns) if order not in used)


def wrapper_places(parameters: Iterable[str]) -> dict[str, str]:
    """The paths of the wrappers around adapted parameters: ``a.experts.down`` -> ``a.experts``.

    Each parameter of a module has its own wrapper, nested in that of the next parameter. The wrapper of the last
    parameter is the outermost; inside it, the next one is at ``a.experts.base_layer``.

    Args:
        parameters: paths of the parameters; those of one module in the module's order.

    Returns:
        Path of each parameter -> path of its wrapper.
    """
    places: dict[str, str] = {}
    inside: dict[str, str] = {}
    for path in reversed(list(parameters)):
        module = path.rpartition(".")[0]
        places[path] = inside.get(module, module)
        inside[module] = f"{places[path]}.base_layer"
    return places


def suffixes(path: str) -> Iterable[str]:
    """Yields a path and its shorter endings: ``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    yield path
    start = path.find(".")
    while start >= 0:
        yield path[start + 1 :]
        start = path.find(".", start + 1)


def pattern_table(config: Any, name: str) -> PatternTable:
    """The table for a field that maps patterns to values.

    It is cached on the config until the field changes.

    Args:
        config: a config.
        name: name of the field.
    """
    patterns = getattr(config, name) or {}
    table: PatternTable | None = config.__dict__.get(f"_{name}_table")
    if table is None or table.patterns != patterns:
        table = config.__dict__[f"_{name}_table"] = PatternTable(patterns)
    return table
