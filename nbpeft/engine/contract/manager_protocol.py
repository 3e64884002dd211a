"""The protocol of ``AdapterManager``, for modules that cannot import it because it imports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.transaction import Block, Transaction
from nbpeft.engine.contract.adapter import AdapterConfig


class Manager(Protocol):
    """The adapters of a model; ``AdapterManager`` implements this and documents the members."""

    alive: bool
    active_state: ActiveState
    unsaved: set[str]

    # State
    @property
    def configs(self) -> dict[str, AdapterConfig]: ...  # noqa: D102
    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def active(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def selected(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def merged(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def layers(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def copies(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def revision(self) -> int: ...  # noqa: D102
    def parameters(self, name: str) -> list[nn.Parameter]: ...  # noqa: D102
    def base_biases(self, name: str) -> dict[str, Tensor]: ...  # noqa: D102
    def require(self, *names: str) -> None: ...  # noqa: D102
    def check_alive(self) -> None: ...  # noqa: D102
    def check_choice(self, names: tuple[str, ...]) -> None: ...  # noqa: D102

    # Changes
    def use(self, names: str | Sequence[str]) -> AbstractContextManager[object]: ...  # noqa: D102
    def ensure_loaded(  # noqa: D102
        self, names: tuple[str, ...], *, switching: bool = False
    ) -> AbstractContextManager[None]: ...
    def transaction(self, *, during_calls: bool = False, quiet: bool = False) -> Block: ...  # noqa: D102
    def select_again(self, names: tuple[str, ...]) -> None: ...  # noqa: D102
    def idle(self, names: tuple[str, ...]) -> set[str]: ...  # noqa: D102
    def refresh(self, names: set[str], change: Transaction) -> None: ...  # noqa: D102
    def changed(self) -> None: ...  # noqa: D102
