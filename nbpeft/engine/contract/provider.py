"""Where adapters come from that are named and not on the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class AdapterProvider(Protocol):
    """Brings adapters that are kept elsewhere onto the model."""

    @property
    def offloaded_count(self) -> int:
        """How many adapters it knows that are not on the model now."""
        ...

    def can_provide(self, name: str) -> bool:
        """Whether it can bring that adapter."""
        ...

    def provide(self, names: Sequence[str], *, switching: bool = False) -> AbstractContextManager[None]:
        """Has those of the adapters that it knows on the model, all together, until the block ends.

        Args:
            names: adapters.
            switching: the block makes them the active ones, so the active ones may go for them.
        """
        ...
