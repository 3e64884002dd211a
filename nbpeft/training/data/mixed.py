"""Draws the rows of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from nbpeft._util.mixtures import Mixture
from nbpeft.display.numbers import count
from nbpeft.errors import ConfigError, NbpeftError, few
from nbpeft.training.data.classes import names_of
from nbpeft.training.data.forms import form_of, keys_of
from nbpeft.training.data.row import labels_in


class MixedRows(list[Any]):
    """The rows of a mixture, in a drawn order.

    Attributes:
        note: how many rows of each part there are.
        features: columns with numbered classes -> their names, as of a dataset.
    """

    note: str = ""
    features: Mapping[str, Any] = MappingProxyType({})


def draw(mixture: Mixture, opened: Callable[[Any], Any], seed: int) -> MixedRows:
    """Draws the rows of a mixture: each at most once, and as many as possible in the given shares.

    Args:
        mixture: the sources and their shares.
        opened: opens a source.
        seed: seed of the random draw.

    Raises:
        ConfigError: a part is a stream, or the parts have different forms, or number classes differently.
        TrainingError: a source cannot be read.
    """
    sources = [opened(part.data) for part in mixture.parts]
    for part, rows in zip(mixture.parts, sources, strict=True):
        if not hasattr(rows, "__len__"):
            raise ConfigError(f"{part.name} of the mixture is a stream, which has no length to draw from", field="data")
    _check_forms(mixture, sources)
    features = _numbered_classes(mixture, sources)
    total = min(len(rows) / share for rows, share in zip(sources, mixture.shares, strict=True))
    numbers = [
        max(1, min(len(rows), round(total * share))) for rows, share in zip(sources, mixture.shares, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        rows[place]
        for rows, number in zip(sources, numbers, strict=True)
        for place in sorted(torch.randperm(len(rows), generator=generator)[:number].tolist())
    ]
    found = MixedRows(drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist())
    parts = zip(mixture.parts, sources, numbers, strict=True)
    counts = [f"{count(number)} of {count(len(rows))} rows of {part.name}" for part, rows, number in parts]
    found.features = features
    found.note = f"mixture: {', '.join(counts)}"
    return found


def _check_forms(mixture: Mixture, sources: Sequence[Any]) -> None:
    """Refuses parts whose rows have different forms."""
    names = []
    for rows in sources:
        columns = getattr(rows, "column_names", None) or keys_of(rows[0])
        try:
            form = form_of(tuple(map(str, columns)), {}, kind=None)
        except NbpeftError:  # columns with other names, which are mapped later
            return
        names.append("tokens" if form is None else form.name)
    if len({*names}) > 1:
        found = ", ".join(f"{part.name} has {name}" for part, name in zip(mixture.parts, names, strict=True))
        raise ConfigError(f"the parts of a mixture must have the same form of rows: {found}", field="data")


def _numbered_classes(mixture: Mixture, sources: Sequence[Any]) -> dict[str, Any]:
    """The columns of datasets whose numbers are classes with names.

    Raises:
        ConfigError: a number means different classes in different parts.
    """
    features = [dict(getattr(rows, "features", None) or {}) for rows in sources]
    found = {name: value for each in features for name, value in each.items() if names_of(value)}
    for column, feature in found.items():
        for part, rows, each in zip(mixture.parts, sources, features, strict=True):
            names = names_of(each.get(column))
            labels = labels_in(rows, column)
            counted = not names and any(type(item) is int for label in labels for item in _listed(label))
            if counted or names not in ((), names_of(feature)):
                raise ConfigError(
                    f"the numbers in {column!r} are not the same classes in all parts of the mixture: {part.name} has "
                    f"{few(names) if names else 'no names for them'}, another has {few(names_of(feature))}",
                    field="data",
                )
    return found


def _listed(label: Any) -> Sequence[Any]:
    return label if isinstance(label, list | tuple) else (label,)
