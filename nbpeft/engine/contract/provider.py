"""Interface for loading adapters on demand that are known by name but not on the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from nbpeft.engine.contract.adapter import AdapterConfig


class AdapterProvider(Protocol):
    """Loads adapters that are stored elsewhere (in host memory or files) onto the model."""

    @property
    def offloaded_count(self) -> int:
        """Number of adapters that it knows and that are not on the model now."""
        ...

    def can_provide(self, name: str) -> bool:
        """Whether it knows an adapter of this name."""
        ...

    def config_of(self, name: str) -> AdapterConfig | None:
        """The config of an adapter, from its files if it is not on the model; None if it knows no such adapter."""
        ...

    def provide(self, names: Sequence[str], *, switching: bool = False) -> AbstractContextManager[None]:
        """Context manager: all of these adapters that it knows are on the model until the block ends.

        Args:
            names: of the adapters; unknown names are ignored.
            switching: the block makes them the active adapters, so that those active now may be evicted.
        """
        ...
