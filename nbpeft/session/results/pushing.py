"""The result of uploading an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Card, Text, card, dim, line, notes
from nbpeft.session.results.base import NotedResult


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
