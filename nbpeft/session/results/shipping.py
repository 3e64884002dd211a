"""Results of sharing an adapter: its upload to the Hub, or the files for a serving engine and how to start it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import Card, Table, Text, card, dim, line, notes
from nbpeft.display.numbers import NONE, size
from nbpeft.session.results.base import NotedResult, RecordResult

if TYPE_CHECKING:
    from nbpeft.shipping import Shipment


@dataclass(frozen=True, repr=False)
class PushResult(NotedResult):
    """An adapter was uploaded.

    Attributes:
        model_name: the notebook variable of the model.
        adapter: name of the adapter.
        commit_url: URL of the commit.
    """

    model_name: str
    adapter: str
    commit_url: str

    @property
    def url(self) -> str:
        """URL of the repository."""
        return self.commit_url.partition("/commit/")[0]

    @property
    def commit(self) -> str:
        """Hash of the commit."""
        return self.commit_url.partition("/commit/")[2]

    def _what(self) -> str:
        return f"pushed {self.adapter!r} to {self.url} (commit {self.commit[:8]})"

    def view(self) -> Card:
        links = line(Text(self.url, href=self.url), dim("· commit"), Text(self.commit[:8], href=self.commit_url))
        return card(f"{self.adapter} · pushed", links, notes(self.notes), aside=self.model_name)


@dataclass(frozen=True, repr=False)
class ShipResult(RecordResult):
    """An adapter was written in the form that a serving engine loads, or would be; has the attributes of the shipment.

    Attributes:
        model_name: the notebook variable of the model.
        shipment: what was written, or would be.
    """

    _RECORD = "shipment"
    model_name: str
    shipment: Shipment

    def _what(self) -> str:
        done = self.shipment
        kind = f" in {done.stored_as}" if done.stored_as else ""
        what = f"{done.adapter!r} for {done.verdict.label}, {self._form()}{kind} ({size(done.byte_count)})"
        did = f"shipped {what} to {done.folder}" if done.written else f"would ship {what} to {done.folder}"
        return f"{did}; start it with: {'; '.join(done.commands)}"

    def _form(self) -> str:
        return "merged into its base" if self.shipment.merged else "as an adapter"

    def view(self) -> Card:
        done = self.shipment
        rows = tuple((name, done.stored_as or "unchanged", size(count)) for name, count in done.files)
        rows += tuple((name, NONE, NONE) for name in done.texts)
        return card(
            f"{done.adapter} · {'shipped' if done.written else 'would be shipped'} for {done.engine}",
            line(dim(f"{done.verdict.label} loads it {self._form()}; in {done.folder}")),
            Table(("File", "Weights", "Size"), rows, right=(2,)),
            *(line(Text(command, "code", wrap="as is")) for command in done.commands),
            notes(self.notes),
            aside=self.model_name,
        )
