"""The session's command that looks into an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbpeft.errors import AdapterError
from nbpeft.session.base import SessionBase
from nbpeft.session.results.inspecting import InspectResult

if TYPE_CHECKING:
    from torch import nn

    ModelLike = nn.Module | str | None


class InspectingCommands(SessionBase):
    """Where adapters changed a model."""

    def inspect(self, name: str | None = None, *, model: ModelLike = None) -> InspectResult:
        """Tells how far an adapter moves the weights, layer by layer; nothing is changed.

        Args:
            name: the active adapter, or the only one, if left out.
            model: an adapted model.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: weights are merged, or it is not clear which adapter is meant.
        """
        from nbpeft.model.inspection import inspect_adapter

        entry = self._book.get(model)
        manager = entry.manager
        if name is None:
            candidates = manager.active if len(manager.active) == 1 else manager.names
            if len(candidates) != 1:
                raise AdapterError(
                    f"say which adapter to inspect: {', '.join(manager.names)}"
                    if candidates
                    else f"{entry.name} has no adapter to inspect"
                )
            name = candidates[0]
        with self._command(f"inspecting {name!r}", slow=True) as notes:
            layers = inspect_adapter(manager, name)
            return InspectResult(entry.name, name, layers, tuple(notes))
