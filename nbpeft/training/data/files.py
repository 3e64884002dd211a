"""Reads rows from a file: JSON Lines, JSON, CSV and TSV with the standard library, Parquet with pyarrow."""

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
"""The number of rows from which the separator of a table's cells is detected."""


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The lower-case suffix of a file's name if files of this kind can be read, else the empty string."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in _READERS else ""


def read_file(path: str | os.PathLike[str]) -> Rows:
    """Reads all rows of a file.

    Raises:
        TrainingError: there is no such file, or its content does not fit its suffix; names the line.
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
    """A list of rows, or an object that contains one list of rows; a file of JSON lines is read as JSON Lines."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return _json_lines(path)
        raise TrainingError(f"{path.name} is not JSON: {in_one_line(error)}.", path=str(path)) from None
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1:
            return list(lists[0])
        raise TrainingError(
            f"{path.name} contains an object with {len(content)} keys; expected a list of rows.", path=str(path)
        )
    if not isinstance(content, list):
        raise TrainingError(f"{path.name} does not contain a list of rows.", path=str(path))
    return content


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where} is not JSON: {in_one_line(error)}.") from None


def _separated(*delimiters: str) -> Callable[[Path], Rows]:
    """A reader of tables with the first separator that gives the same number of columns, at least 2, in each row."""

    def read(path: Path) -> Rows:
        with open(path, encoding="utf-8-sig", newline="") as lines, _long_fields():
            fits = (separator for separator in delimiters if len(delimiters) > 1 and _fits(lines, separator))
            delimiter = next(fits, delimiters[0])
            lines.seek(0)
            return list(_cells(csv.DictReader(lines, delimiter=delimiter), path, delimiter))

    return read


@contextmanager
def _long_fields() -> Iterator[None]:
    """A block in which a cell may be as long as a document.

    The limit is a global of the csv module and a C long, which has 32 bits on Windows.
    """
    previous_limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(previous_limit)


def _fits(lines: TextIO, delimiter: str) -> bool:
    lines.seek(0)
    try:
        widths = {len(row) for row in itertools.islice(csv.reader(lines, delimiter=delimiter), _COMPARED) if row}
    except csv.Error:
        return False
    return len(widths) == 1 and widths.pop() > 1


def _cells(table: csv.DictReader[str], path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    names = list(table.fieldnames or ())
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise TrainingError(
            f"{path.name} has two columns called {duplicate!r:.60}: rename one of them.", path=str(path)
        )
    try:
        for row in table:
            if None in row:
                raise TrainingError(
                    f"{path.name}, line {table.line_num} has more cells than the {len(row) - 1} of its header "
                    f"(separated by {delimiter!r}): text that contains the separator must be quoted.",
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
