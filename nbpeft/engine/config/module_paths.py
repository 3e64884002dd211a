"""Names and patterns that mean modules by the end of their path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from nbpeft.engine.config.patterns import ENDING

PLAIN_PATTERN = re.compile(r"\^?[\w.]+")
"""A pattern that is a name, or with ``^`` a whole path."""


class PatternTable:
    """First pattern that matches the end of a path at a dot, in O(segments) for plain names.

    A pattern is a regular expression over whole trailing segments, as in PEFT; one that holds
    only names and dots is looked up instead of matched, so thousands of them cost nothing.
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
        """The value of the first matching pattern, or the default."""
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
        """Patterns that match none of the paths, whether or not an earlier one comes before them."""
        if not self._values:
            return ()
        known = list(paths)
        endings = {name for path in known for name in (f"^{path}", *suffixes(path))}
        used = {order for pattern, order in self._plain.items() if pattern in endings}
        used.update(order for order, pattern in self._regular if any(pattern.match(path) for path in known))
        return tuple(pattern for order, pattern in enumerate(self.patterns) if order not in used)


def wrapper_places(parameters: Iterable[str]) -> dict[str, str]:
    """Path of an adapted parameter -> place of its wrapper: ``a.experts.down`` -> ``a.experts``.

    Several of one module have a wrapper each, the last one outside: ``a.experts.base_layer`` is the next.

    Args:
        parameters: paths, those of one module in its own order.
    """
    places: dict[str, str] = {}
    inside: dict[str, str] = {}
    for path in reversed(list(parameters)):
        module = path.rpartition(".")[0]
        places[path] = inside.get(module, module)
        inside[module] = f"{places[path]}.base_layer"
    return places


def suffixes(path: str) -> Iterable[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    yield path
    start = path.find(".")
    while start >= 0:
        yield path[start + 1 :]
        start = path.find(".", start + 1)


def pattern_table(config: Any, name: str) -> PatternTable:
    """The table of a config's field that maps patterns to values, kept with the config until the field changes."""
    patterns = getattr(config, name) or {}
    table: PatternTable | None = config.__dict__.get(f"_{name}_table")
    if table is None or table.patterns != patterns:
        table = config.__dict__[f"_{name}_table"] = PatternTable(patterns)
    return table
