"""The result of merging into a copy: a full-precision copy on disk, and the merge errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import Card, Table, card, dim, line, notes
from nbpeft.display.numbers import NONE, plural, size
from nbpeft.session.results.base import RecordResult

if TYPE_CHECKING:
    from nbpeft.model.saving.merge_export import MergedFolder, MergeErrors

_SHOWN = 5


@dataclass(frozen=True, repr=False)
class MergedCopy(RecordResult):
    """A merged model was written to disk; the model in memory is not changed. Has the attributes of ``merged``.

    Attributes:
        model_name: the notebook variable of the model.
        merged: the written model, with its merge errors.
    """

    _RECORD = "merged"
    model_name: str
    merged: MergedFolder

    @property
    def folder(self) -> str:
        """The folder, which ``from_pretrained`` can load."""
        return str(self.merged.folder)

    @property
    def errors(self) -> MergeErrors:
        """The merge errors, by layer and in total."""
        assert self.merged.errors is not None
        return self.merged.errors

    def _what(self) -> str:
        what = f"merged {', '.join(map(repr, self.merged.names))} of {self.model_name} into a copy in {self.folder}"
        return f"{what} ({self._stored()}); {self.errors}"

    def _stored(self) -> str:
        done = self.merged
        return f"{done.dtype}, {size(done.byte_count)} in {plural(len(done.shard_bytes), 'file')}"

    def _both(self, error: float) -> tuple[str, str]:
        return _figure(error), self.errors.delta_message(error)

    def view(self) -> Card:
        requantized = self.errors.requantized
        ways = [("this copy", self.merged.dtype, *self._both(self.errors.full_precision))]
        if requantized is not None:
            ways.append(("into the quantized weights", "quantized again", *self._both(requantized)))
        head = ("Way to merge", "Weights", "Relative error", "Of what the adapter adds")
        return card(
            f"{', '.join(self.merged.names)}: merged into a copy",
            line(dim(f"{self.folder}: {self._stored()}")),
            Table(head, tuple(ways), right=(2, 3)),
            self._worst(),
            notes(self.notes),
            aside=self.model_name,
        )

    def _worst(self) -> Table | None:
        """Returns the layers with the largest errors; None if no layer has an error."""
        layers = [item for item in self.errors.layers if item.requantized or item.full_precision]
        layers.sort(key=lambda item: -(item.requantized or item.full_precision))
        again = self.errors.requantized is not None
        rows = tuple(
            (item.path, _figure(item.full_precision), *((_figure(item.requantized),) if again else ()))
            for item in layers[:_SHOWN]
        )
        title = f"Layers with the largest errors, of {len(self.errors.layers)}"
        return Table((title, "Copy", *(("Quantized again",) if again else ())), rows, right=(1, 2)) if rows else None


def _figure(error: float | None) -> str:
    return NONE if error is None else f"{error:.2e}" if error else "0"
