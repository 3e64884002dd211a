"""Loads datasets from the Hub and from folders with the ``datasets`` library."""

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
"""The greatest number of files in a folder of data; the largest text corpora on the Hub have about as many shards."""


@dataclass(frozen=True)
class DatasetName:
    """The parts of ``user/name:config:split[:1000]``.

    Attributes:
        place: an id on the Hub, or a folder.
        config: a config of the dataset; empty for its only one.
        split: a split of the dataset; empty for ``train`` or its only one.
        part: a slice of its rows in the notation of ``datasets``: ``[:1000]``, ``[10%:]``.
    """

    place: str
    config: str = ""
    split: str = ""
    part: str = ""

    def __str__(self) -> str:
        return self.place


def load_named(name: DatasetName) -> Any:
    """Loads the rows of a dataset on the Hub, or in a folder.

    If the Hub cannot be reached, the cache is used at once, without repeated attempts.

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
    """Refuses a folder that is not a data folder: ``datasets`` would scan everything below it for minutes."""
    count = 0
    for _, _, files in os.walk(place):
        count += len(files)
        if count > MOST_FILES:
            raise TrainingError(
                f"The folder {place!r:.100} has more than {MOST_FILES:,} files; name one with only the data.",
                name=place,
            )
    if count == 0:
        raise TrainingError(f"The folder {place!r:.100} has no files; expected a folder with data.", name=place)


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
    except Exception as error:  # from the Hub's client, the reader of a file, or the operating system
        if offline and isinstance(error, (OSError, ValueError)):
            raise TrainingError(
                f"{name.place!r:.100} is not a folder here{offline} is not in the cache of datasets.", name=name.place
            ) from None
        raise TrainingError(f"{name.place!r:.100} cannot be read: {in_one_line(error):.250}", name=name.place) from None
    raise _which_split(name, splits)


def _saved(datasets: Any, name: DatasetName) -> Any:
    """Loads a dataset that ``save_to_disk`` wrote."""
    dataset = datasets.load_from_disk(name.place)
    if hasattr(dataset, "keys"):
        split = name.split or ("train" if "train" in dataset else next(iter(dataset)) if len(dataset) == 1 else "")
        if split not in dataset:
            raise _which_split(name, dataset)
        dataset = dataset[split]
    return dataset if not name.part else dataset.select(range(len(dataset))[slice_of(name.part)])


def _which_split(name: DatasetName, splits: Any) -> TrainingError:
    hint = did_you_mean(name.split, splits) if name.split else ""
    return TrainingError(f"Say which split of {name.place!r:.100}: {', '.join(splits)}.{hint}", splits=list(splits))


def slice_of(part: str) -> slice:
    """Parses ``[:1000]`` as a slice.

    Raises:
        TrainingError: its bounds are not whole numbers.
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
    """A block in which ``datasets`` uses only its cache if ``wanted``: it would retry for half a minute otherwise."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
