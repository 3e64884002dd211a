"""What shipping an adapter gives: the verdict, the files and how to start the engine."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Card, Table, Text, card, dim, line, notes
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import size
from nbpeft.session.results.base import Result


@dataclass(frozen=True, repr=False)
class ShipResult(Result):
    """An adapter was written as an engine loads it, or would be.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: the adapter.
        engine: name of the engine.
        checked: the engine for people, with the version that its rules were read from.
        merged: whether the adapter went merged into its base.
        stored_as: type of the weights; empty where they stay as they are.
        folder: where the files are.
        files: (name, bytes) of each file with weights.
        commands: command lines that start the engine.
        written: whether the files are there.
        notes: what a person should know.
    """

    model_name: str
    adapter: str
    engine: str
    checked: str
    merged: bool
    stored_as: str
    folder: str
    files: tuple[tuple[str, int], ...]
    commands: tuple[str, ...]
    written: bool
    notes: tuple[str, ...] = ()

    @property
    def byte_count(self) -> int:
        """Bytes of all weights."""
        return sum(count for _, count in self.files)

    def __str__(self) -> str:
        kind = f" in {self.stored_as}" if self.stored_as else ""
        what = f"{self.adapter!r} for {self.checked}, {self._form()}{kind} ({size(self.byte_count)})"
        did = f"shipped {what} to {self.folder}" if self.written else f"would ship {what} to {self.folder}"
        return with_notes(f"{did}; start it with: {'; '.join(self.commands)}", self.notes)

    def _form(self) -> str:
        return "merged into its base" if self.merged else "as an adapter"

    def view(self) -> Card:
        """The files with their sizes, and the commands."""
        rows = tuple((name, self.stored_as or "as it is", size(count)) for name, count in self.files)
        return card(
            f"{self.adapter} · {'shipped' if self.written else 'would be shipped'} for {self.engine}",
            line(dim(f"{self.checked} takes it {self._form()}; in {self.folder}")),
            Table(("File", "Weights", "Size"), rows, right=(2,)),
            *(line(Text(command, "code", wrap="as is")) for command in self.commands),
            notes(self.notes),
            aside=self.model_name,
        )
