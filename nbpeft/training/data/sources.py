"""The sources of rows: lists, datasets, streams, tables, files and datasets on the Hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from nbpeft._util.mixtures import Mixture
from nbpeft.errors import TrainingError, check_bool, few, with_article
from nbpeft.names import DEFAULT_SEED
from nbpeft.training.data.files import SUFFIXES, has_separator, read_file, refuse_separator, suffix_of
from nbpeft.training.data.hub import DatasetName, load_named, slice_of
from nbpeft.training.data.left_out import Unreadable
from nbpeft.training.data.mixed import draw

SOURCES = "a list of rows, a dataset, a DataFrame, a file or the name of a dataset"
_NAME = re.compile(r"(?P<place>[^\[\]:]+)(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?(?P<part>\[[^\]]*\])?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_data(
    data: Any, separator: str | None = None, *, skip_bad: bool | None = False, seed: int = DEFAULT_SEED
) -> Any:
    """Opens rows of any source.

    The result can be passed to it again and is then returned unchanged.

    Args:
        data: a list, a ``datasets.Dataset`` or ``IterableDataset``, a torch dataset, a DataFrame of pandas or
            polars, the path of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, or the name of a
            dataset on the Hub: ``user/name``, ``user/name:split``, ``user/name:config:split[:1000]``; or a
            :class:`Mixture` of them.
        separator: what separates the cells of a ``.csv`` or ``.tsv`` file; None detects it.
        skip_bad: keep lines of a file that cannot be parsed as rows that cannot be read; None if that cannot be
            requested.
        seed: seed with which the rows of a :class:`Mixture` are drawn.

    Returns:
        A sequence with a length, or a stream that can only be iterated.

    Raises:
        ConfigError: ``skip_bad`` is neither True nor False.
        TrainingError: it is none of these, cannot be read, or has no rows.
    """
    if skip_bad is not None:
        check_bool("skip_bad", skip_bad)
    if isinstance(data, Mixture):
        return draw(data, lambda part: open_data(part, separator_for(part, separator), skip_bad=skip_bad), seed)
    if isinstance(data, Mapping):
        raise _dictionary(data)
    if isinstance(data, (str, os.PathLike)):
        return _named(os.fspath(data), separator, skip_bad=skip_bad)
    if separator is not None:
        raise TrainingError(f"separator is for .csv and .tsv files, and the data is {with_article(data)}.")
    if hasattr(data, "columns") and not hasattr(data, "column_names"):
        data = _records(data)
    if not is_stream(data) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        instead = " Make a list of it: list(…)." if hasattr(data, "__next__") else ""
        raise TrainingError(f"Expected {SOURCES}, found {with_article(data)}.{instead}")
    if isinstance(data, (bytes, bytearray)):
        raise TrainingError(f"Expected {SOURCES}, found {with_article(data)}.")
    if not is_stream(data) and len(data) == 0:
        raise TrainingError(f"The {'dataset' if hasattr(data, 'column_names') else 'data'} has no rows.")
    return data


def separator_for(data: Any, separator: str | None) -> str | None:
    """The separator for further data of a command; None for data that is no table of text and so has none.

    Args:
        data: rows, or where they are.
        separator: the separator that was given; None if it is detected.
    """
    is_table = isinstance(data, str | os.PathLike) and has_separator(place_in(os.fspath(data)))
    return separator if is_table else None


def place_in(text: str) -> str:
    """The file, folder or dataset id in the name of data, without config, split and slice."""
    match = None if os.path.exists(text) else _NAME.fullmatch(text)
    return text if match is None else match["place"]


def is_stream(data: Any) -> bool:
    """Whether rows are a stream, which can only be iterated and has no known length."""
    return not hasattr(data, "__len__") and (
        isinstance(data, IterableDataset) or (hasattr(data, "column_names") and hasattr(data, "__iter__"))
    )


def first_row(rows: Any) -> Any:
    """The first row of a sequence or a stream.

    Raises:
        TrainingError: the stream has no rows.
    """
    if not is_stream(rows):
        return next((row for row in rows if not isinstance(row, Unreadable)), rows[0])
    rows_read = list(itertools.islice(rows, 1))
    if not rows_read:
        raise TrainingError("The stream has no rows.")
    return rows_read[0]


def _named(text: str, separator: str | None, *, skip_bad: bool | None) -> Any:
    text = os.path.expanduser(text)
    match = _NAME.fullmatch(text)
    place, part = (text, "") if match is None or os.path.exists(text) else (match["place"], match["part"] or "")
    if suffix_of(place) and not os.path.isdir(place):
        rows = read_file(place, separator, skip_bad=skip_bad)
        return rows[slice_of(part)] if part else rows
    if separator is not None:
        refuse_separator(place, separator)
    if match is not None and (os.path.isdir(place) or _HUB_ID.fullmatch(place)):
        first, second = match["first"] or "", match["second"] or ""
        config, split = (first, second) if second else ("", first)
        return load_named(DatasetName(place, config, split, part))
    ways = f"a file ({', '.join(SUFFIXES)}), a folder, or a dataset on the Hub (user/name, user/name:split)"
    raise TrainingError(f"{text!r:.100} does not name data; expected {ways}.")


def _records(table: Any) -> Any:
    """The rows of a DataFrame, detected by its methods, so that neither pandas nor polars has to be imported."""
    if hasattr(table, "to_dicts"):
        return table.to_dicts()
    if not hasattr(table, "to_dict"):
        return table
    names = list(getattr(table, "columns", ()))  # pandas allows several columns of one name, and would return the last
    for twice in (name for name in names if names.count(name) > 1):
        raise TrainingError(f"The DataFrame has {names.count(twice)} columns named {twice!r:.40}; rename all but one.")
    return table.to_dict("records")


def _dictionary(data: Mapping[Any, Any]) -> TrainingError:
    names = [str(name) for name in data]
    if any(hasattr(part, "column_names") for part in data.values()):
        return TrainingError(f"This is a dictionary of datasets; pass one of them: {', '.join(names)}.", splits=names)
    return TrainingError(f"Expected {SOURCES}, found a dictionary with {few(names, 8) or 'no keys'}.")
