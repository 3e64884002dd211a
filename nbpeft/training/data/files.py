"""Reads rows from a file: JSON Lines, JSON, CSV and TSV with the standard library, Parquet with pyarrow."""

from __future__ import annotations

import codecs
import csv
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nbpeft._util.optional import needs
from nbpeft.checkpoint import inside
from nbpeft.errors import TrainingError, did_you_mean, in_one_line
from nbpeft.training.data.left_out import SKIP, Unreadable

Rows = list[Any]
"""Dictionaries, and ``Unreadable`` for lines that cannot be parsed."""
_SHOWN = 3
"""The number of lines that cannot be parsed that a message names."""
_COMPARED = 100
"""The number of rows from which the separator of a table's cells is detected."""
_FITS = 0.9
"""The least share of rows with as many cells as the header with which a separator is likely the right one."""


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The lower-case suffix of a file's name if files of this kind can be read, else the empty string."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in _READERS else ""


def read_file(path: str | os.PathLike[str], separator: str | None = None, *, skip_bad: bool | None = False) -> Rows:
    """Reads all rows of a file.

    Args:
        path: the file.
        separator: what separates the cells of a CSV or TSV file; None detects it.
        skip_bad: return lines that cannot be parsed as ``Unreadable``; None if that cannot be requested.

    Raises:
        TrainingError: there is no such file, or its content does not fit its suffix; names the lines.
    """
    place = Path(path)
    suffix = suffix_of(place)
    reader = _READERS[suffix]
    if separator is not None:
        refuse_separator(place, separator)
        reader = functools.partial(_table, separators=(separator,))
    try:
        if not inside.leads_to_file(place):
            raise TrainingError(f"There is no file {str(place)!r:.200}.{_nearest(place)}", path=str(place))
        rows = reader(place)
    except UnicodeDecodeError:
        instead = f", or pass the table that {_read_by_pandas(place)} reads" if has_separator(place) else ""
        raise TrainingError(
            f"{place.name} is not UTF-8 text: save it in that encoding{instead}.", path=str(place)
        ) from None
    except OSError as error:
        raise TrainingError(f"{place.name} cannot be read: {error.strerror or error}.", path=str(place)) from None
    if not rows:
        raise TrainingError(f"{place.name} has no rows.", path=str(place))
    bad = [row.why for row in rows if isinstance(row, Unreadable)]
    if bad and not (skip_bad and len(bad) < len(rows)):
        hint = "" if len(bad) == len(rows) or skip_bad is None else f" {SKIP}"
        count = f"{len(bad):,} of {len(rows):,} rows cannot be read: " if len(bad) > 1 else ""
        raise TrainingError(f"{count}{'; '.join(bad[:_SHOWN])}.{hint}", path=str(place), bad=len(bad))
    return rows


def refuse_separator(path: str | os.PathLike[str], separator: str) -> None:
    """Refuses a separator that is invalid, or without effect because the data is no table of text.

    Raises:
        TrainingError: the separator is refused.
    """
    if not isinstance(separator, str) or len(separator) != 1 or separator in '"\r\n':
        raise TrainingError(f"separator must be one character, such as ';' or a tab, not {separator!r:.40}.")
    if not has_separator(path):
        raise TrainingError(f"separator is for {' and '.join(_SEPARATORS)} files, and {os.fspath(path)!r:.60} is none.")


def has_separator(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a table of text, by its suffix."""
    return suffix_of(path) in _SEPARATORS


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
        return Unreadable(f"{where} is not JSON: {in_one_line(error)}")


def _table(path: Path, separators: Sequence[str]) -> Rows:
    """The rows of a table with a header.

    Args:
        path: the file.
        separators: the separators of its cells that are possible.
    """
    with open(path, encoding="utf-8-sig", newline="") as lines, _long_fields():
        begin, chosen = 0, _given_inside(lines.readline())
        if chosen:
            begin = lines.tell()
        separator = chosen or _best(lines, separators)
        if not chosen and len(separators) == 1:
            _refuse_other(lines, path, separator)
        lines.seek(begin)
        return list(_cells(csv.DictReader(lines, delimiter=separator), path, separator))


def _refuse_other(lines: TextIO, path: Path, separator: str) -> None:
    """Refuses a separator that the header does not have, if another one fits.

    Raises:
        TrainingError: another one fits the rows; names it.
    """
    if _fit(lines, separator)[1]:
        return
    other = _best(lines, _SEPARATORS[".csv"])
    share, width = _fit(lines, other)
    if width and share > _FITS:
        raise TrainingError(
            f"{path.name} has only one column with the separator {separator!r}: the separator seems to be {other!r}.",
            path=str(path),
        )


def _read_by_pandas(path: Path) -> str:
    """The call of pandas that reads a table that is not in UTF-8: in the encoding that spreadsheets write."""
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
    with open(path, encoding=encoding, errors="replace", newline="") as lines, _long_fields():
        separator = _best(lines, (*_SEPARATORS[".csv"],))
    given = "" if separator == "," else f"sep={separator!r}, "
    return f"pandas.read_csv({str(path)!r}, {given}encoding={encoding!r})"


def _given_inside(line: str) -> str:
    """The separator that a first line ``sep=;`` names, as spreadsheets write it; empty for any other line."""
    line = line.strip("\r\n")
    return line[-1] if len(line) == 5 and line.startswith("sep=") else ""


def _best(lines: TextIO, separators: Sequence[str]) -> str:
    """The separator that gives most rows as many cells, at least 2, as the header; the first one if none does."""
    if len(separators) == 1:
        return separators[0]
    fits = {separator: _fit(lines, separator) for separator in separators}
    return max(separators, key=lambda separator: fits[separator])


def _fit(lines: TextIO, separator: str) -> tuple[float, int]:
    """The share of rows with as many cells as the header, and this number; zeros if the header has one cell."""
    lines.seek(0)
    try:
        read = csv.reader(lines, delimiter=separator)
        widths = [len(row) for row in itertools.islice(read, _COMPARED) if row]
    except csv.Error:
        return 0.0, 0
    if not widths or widths[0] < 2:
        return 0.0, 0
    return sum(width == widths[0] for width in widths[1:]) / max(1, len(widths) - 1), widths[0]


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


def _cells(table: csv.DictReader[str], path: Path, delimiter: str) -> Iterator[dict[str, Any] | Unreadable]:
    names = list(table.fieldnames or ())
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise TrainingError(
            f"{path.name} has two columns called {duplicate!r:.60}: rename one of them.", path=str(path)
        )
    try:
        for row in table:
            if None in row:
                yield Unreadable(
                    f"{path.name}, line {table.line_num} has more cells than the {len(row) - 1} of its header "
                    f"(separated by {delimiter!r}): text that contains the separator must be quoted, or another "
                    "separator is given (separator=…)"
                )
            else:
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


_SEPARATORS: dict[str, tuple[str, ...]] = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t",)}
_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    **{suffix: functools.partial(_table, separators=those) for suffix, those in _SEPARATORS.items()},
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
