"""The interface of objects that load adapters onto the model on demand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from nbpeft.engine.contract.adapter import AdapterConfig


class AdapterProvider(Protocol):
    """Loads adapters that are stored elsewhere (in host memory or files) onto the model."""

    @property
    def offloaded_count(self) -> int:
        """Number of known adapters that are not on the model."""
        ...

    def can_provide(self, name: str) -> bool:
        """Whether there is a known adapter of this name."""
        ...

    def config_of(self, name: str) -> AdapterConfig | None:
        """The config of an adapter, from its files if it is not on the model; None if it knows no such adapter."""
        ...

    def provide(self, names: Sequence[str], *, switching: bool = False) -> AbstractContextManager[None]:
        """Context manager: the known adapters among these are on the model until the block ends.

        Args:
            names: names of the adapters; unknown names are ignored.
            switching: the block makes them the active adapters, so that those active now may be evicted.
        """
        ...
