"""Rows of a file: JSON Lines, JSON, CSV and TSV with the standard library, Parquet with what is installed."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nbpeft._util.optional import needs
from nbpeft.errors import TrainingError, did_you_mean, in_one_line

Rows = list[dict[str, Any]]
_COMPARED = 100
"""Rows of a table that tell what separates its cells."""


def suffix_of(path: str | os.PathLike[str]) -> str:
    """How a file's name ends, in small letters, where it is one that can be read; else the empty string."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in _READERS else ""


def read_file(path: str | os.PathLike[str]) -> Rows:
    """All rows of a file.

    Raises:
        TrainingError: there is no such file, or it is not what its name says; names the line.
    """
    place = Path(path)
    reader = _READERS[suffix_of(place)]
    if not place.is_file():
        raise TrainingError(f"There is no file {str(place)!r:.200}.{_nearest(place)}", path=str(place))
    try:
        rows = reader(place)
    except UnicodeDecodeError:
        raise TrainingError(f"{place.name} is not UTF-8 text: save it in that encoding.", path=str(place)) from None
    except OSError as error:
        raise TrainingError(f"{place.name} cannot be read: {error.strerror or error}.", path=str(place)) from None
    if not rows:
        raise TrainingError(f"{place.name} has no rows.", path=str(place))
    return rows


def _nearest(place: Path) -> str:
    try:
        names = [item.name for item in place.parent.iterdir() if suffix_of(item)]
    except OSError:
        return f" There is no folder {str(place.parent)!r:.100}."
    return did_you_mean(place.name, names)


def _json_lines(path: Path) -> Rows:
    with open(path, encoding="utf-8-sig") as lines:
        return [_decoded(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _json(path: Path) -> Rows:
    """A list of rows, or an object that holds one; lines of JSON are read as such."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return _json_lines(path)
        raise TrainingError(f"{path.name} is not JSON: {in_one_line(error)}.", path=str(path)) from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1:
            return list(lists[0])
        raise TrainingError(
            f"{path.name} holds an object with {len(found)} keys; expected a list of rows.", path=str(path)
        )
    if not isinstance(found, list):
        raise TrainingError(f"{path.name} holds no list of rows.", path=str(path))
    return found


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where} is not JSON: {in_one_line(error)}.") from None


def _separated(*delimiters: str) -> Callable[[Path], Rows]:
    """A reader of cells between separators: the first that gives several columns, as many in each row."""

    def read(path: Path) -> Rows:
        with open(path, encoding="utf-8-sig", newline="") as lines, _long_fields():
            fits = (one for one in delimiters if len(delimiters) > 1 and _fits(lines, one))
            delimiter = next(fits, delimiters[0])
            lines.seek(0)
            return list(_cells(csv.DictReader(lines, delimiter=delimiter), path, delimiter))

    return read


@contextmanager
def _long_fields() -> Iterator[None]:
    """A block in which a cell may be a whole document: the limit is the module's, in a C long of 32 bits on Windows."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _fits(lines: TextIO, delimiter: str) -> bool:
    lines.seek(0)
    try:
        widths = {len(row) for row in itertools.islice(csv.reader(lines, delimiter=delimiter), _COMPARED) if row}
    except csv.Error:
        return False
    return len(widths) == 1 and widths.pop() > 1


def _cells(table: csv.DictReader[str], path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    names = list(table.fieldnames or ())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TrainingError(f"{path.name} has two columns called {twice!r:.60}: rename one of them.", path=str(path))
    try:
        for row in table:
            if None in row:
                raise TrainingError(
                    f"{path.name}, line {table.line_num} has more cells than the {len(row) - 1} of its header "
                    f"(separated by {delimiter!r}): text that holds the separator belongs in quotes.",
                    path=str(path),
                )
            yield row
    except csv.Error as error:
        raise TrainingError(f"{path.name}, line {table.line_num}: {error}.", path=str(path)) from None


def _parquet(path: Path) -> Rows:
    with needs("pyarrow", f"Reading {path.name}"):
        import pyarrow.parquet as parquet
    try:
        rows: Rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow has errors of its own
        raise TrainingError(f"{path.name} is not Parquet: {in_one_line(error):.120}", path=str(path)) from None
    return rows


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(",", ";", "\t", "|"),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
