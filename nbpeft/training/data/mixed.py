"""Draws the rows of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nbpeft._util.mixtures import Mixture
from nbpeft.display.numbers import count
from nbpeft.errors import ConfigError, NbpeftError
from nbpeft.training.data.forms import form_of, keys_of


class MixedRows(list[Any]):
    """The rows of a mixture, in a drawn order.

    Attributes:
        note: how many rows of each part there are.
    """

    note: str = ""


def draw(mixture: Mixture, opened: Callable[[Any], Any], seed: int) -> MixedRows:
    """Draws the rows of a mixture: each at most once, and as many as possible in the given shares.

    Args:
        mixture: the sources and their shares.
        opened: opens a source.
        seed: seed of the random draw.

    Raises:
        ConfigError: a part is a stream, or the parts have different forms.
        TrainingError: a source cannot be read.
    """
    sources = [opened(part.data) for part in mixture.parts]
    for part, rows in zip(mixture.parts, sources, strict=True):
        if not hasattr(rows, "__len__"):
            raise ConfigError(f"{part.name} of the mixture is a stream, which has no length to draw from", field="data")
    _check_forms(mixture, sources)
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
