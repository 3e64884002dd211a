"""Wrapper: base class of the modules that replace a layer, or a module trained as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nbpeft.engine.changes.active_state import ActiveState, LayerState


class Wrapper(nn.Module):
    """Replaces a module of the model and has the parts of named adapters for it.

    Attributes:
        active_state: which adapters are active: the state of the model, or a separate one of this wrapper.
    """

    active_state: ActiveState | LayerState

    def _named(self) -> dict[str, Any]:
        """Adapter name -> the adapter's module in this wrapper."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.active_state, LayerState):  # the next command on the model ends it in a copy, too
            self.active_state.shared.apart.add(self)

    def _get_name(self) -> str:
        return type(self).__name__

    @property
    def adapters_enabled(self) -> bool:
        """Whether adapters are enabled here."""
        state: Any = self.active_state
        return bool(state.enabled if isinstance(state, LayerState) else self._commands().manager.enabled)

    def chosen_names(self) -> list[str]:
        """Names of the active adapters here, whether or not they are enabled."""
        state: Any = self.active_state
        return list(state.names if isinstance(state, LayerState) else self._commands().chosen)

    def _commands(self) -> Any:
        """The ``LayerCommands`` of the model."""
        return self._shared_state().layer_commands

    def _shared_state(self) -> ActiveState:
        state: Any = self.active_state
        return getattr(state, "shared", state)

    def _activate_alone(self, names: Sequence[str], *, enabled: bool) -> None:
        """Activates adapters on this wrapper only, until the next command on the model.

        Args:
            names: names of the adapters; those without a part here are ignored.
            enabled: whether adapters are enabled.
        """
        shared = self._shared_state()
        shared.refuse_changes()
        now = shared.current().names
        alike = tuple(names) == now if enabled else not now
        self.__dict__["active_state"] = shared if alike else LayerState(shared, names, enabled=enabled)
        (shared.apart.discard if alike else shared.apart.add)(self)
