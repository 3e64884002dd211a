"""Datasets of the hub, and folders of data, through the ``datasets`` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nbpeft._util.hub_access import hub_answers
from nbpeft._util.optional import needs
from nbpeft.errors import TrainingError, did_you_mean, in_one_line

MOST_FILES = 10_000
"""In a folder of data; the largest text corpora of the hub have as many shards."""


@dataclass(frozen=True)
class DatasetName:
    """What ``user/name:config:split[:1000]`` names.

    Attributes:
        place: an id on the hub, or a folder.
        config: of the dataset; its only one if empty.
        split: of the dataset; ``train``, or its only one, if empty.
        part: which of its rows, as ``datasets`` writes it: ``[:1000]``, ``[10%:]``.
    """

    place: str
    config: str = ""
    split: str = ""
    part: str = ""

    def __str__(self) -> str:
        return self.place


def load_named(name: DatasetName) -> Any:
    """The rows of a dataset on the hub, or in a folder.

    Where the hub does not answer, what lies in the cache is used, without further attempts.

    Raises:
        MissingPackageError: ``datasets`` is not installed.
        TrainingError: there is no such dataset, config or split.
    """
    with needs("datasets", f"Reading the dataset {name.place!r:.100}"):
        import datasets
    if os.path.isdir(name.place):
        if any(os.path.exists(os.path.join(name.place, file)) for file in ("state.json", "dataset_dict.json")):
            return _saved(datasets, name)
        _check_folder(name.place)
        return _loaded(datasets, name, "")
    online = hub_answers()
    with _offline(datasets, not online):
        return _loaded(datasets, name, "" if online else ", the hub is offline or cannot be reached, and it")


def _check_folder(place: str) -> None:
    """Refuses a folder that is not one of data: ``datasets`` would go over everything below it, for minutes."""
    count = 0
    for _, _, files in os.walk(place):
        count += len(files)
        if count > MOST_FILES:
            raise TrainingError(
                f"The folder {place!r:.100} holds more than {MOST_FILES:,} files; name one that holds the data alone.",
                name=place,
            )
    if count == 0:
        raise TrainingError(f"The folder {place!r:.100} holds no file; expected one with data.", name=place)


def _loaded(datasets: Any, name: DatasetName, offline: str) -> Any:
    def load(split: str | None) -> Any:
        return datasets.load_dataset(name.place, name.config or None, split=split)

    try:
        try:
            return load(f"{name.split or 'train'}{name.part}")
        except ValueError as error:
            if name.split or "Unknown split" not in str(error):
                raise
        splits = load(None)
        if len(splits) == 1:
            return load(f"{next(iter(splits))}{name.part}")
    except datasets.exceptions.DatasetNotFoundError as error:
        raise TrainingError(f"{name.place!r:.100}: {in_one_line(error):.200}", name=name.place) from None
    except Exception as error:  # of the hub's client, of a file's reader, of the operating system
        if offline and isinstance(error, (OSError, ValueError)):
            raise TrainingError(
                f"{name.place!r:.100} is not a folder here{offline} is not in the cache of datasets.", name=name.place
            ) from None
        raise TrainingError(f"{name.place!r:.100} cannot be read: {in_one_line(error):.250}", name=name.place) from None
    raise _which_split(name, splits)


def _saved(datasets: Any, name: DatasetName) -> Any:
    """What ``save_to_disk`` wrote."""
    found = datasets.load_from_disk(name.place)
    if hasattr(found, "keys"):
        split = name.split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else "")
        if split not in found:
            raise _which_split(name, found)
        found = found[split]
    return found if not name.part else found.select(range(len(found))[slice_of(name.part)])


def _which_split(name: DatasetName, splits: Any) -> TrainingError:
    near = did_you_mean(name.split, splits) if name.split else ""
    return TrainingError(f"Say which split of {name.place!r:.100}: {', '.join(splits)}.{near}", splits=list(splits))


def slice_of(part: str) -> slice:
    """``[:1000]`` as a slice.

    Raises:
        TrainingError: it is not one of whole numbers.
    """
    first, colon, last = part.strip("[]").partition(":")
    try:
        if colon:
            return slice(int(first) if first.strip() else None, int(last) if last.strip() else None)
    except ValueError:
        pass
    raise TrainingError(f"{part!r:.40} is not a range of rows; expected e.g. [:1000]")


@contextmanager
def _offline(datasets: Any, wanted: bool) -> Iterator[None]:
    """Lets ``datasets`` use what it has cached, where the hub does not answer: it would try for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
