"""AdaptedComposite: the wrapper around a module that computes with several weights itself (nn.MultiheadAttention).

Adapters of the module's own weight are on this wrapper; those of inner layers, which the module never calls, are on
these layers. With active adapters it calls a shallow copy of the module whose weights include the deltas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbpeft.engine.changes.active_state import ActiveAdapters
from nbpeft.engine.contract.base import Composite
from nbpeft.engine.views.shown_modules import use_shown
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.parameter_layer import AdaptedOwner, factored_weight, twin_of
from nbpeft.errors import AdapterError


class AdaptedComposite(AdaptedOwner):
    """A module of a ``Composite`` kind and the named adapters of its own weight."""

    kind: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module with the active adapters' deltas on all its weights."""
        owners = (self, *self._layers().values())
        active = self.active_state.current()
        if any(owner.has_any_of(active) for owner in owners):
            # As a decorator, it would import the compiler with this module.
            adapted = torch.compiler.disable(self._adapted) if torch.compiler.is_compiling() else self._adapted
            return adapted(args, kwargs)
        return self.wrapped_module()(*args, **kwargs)

    def _layers(self) -> dict[str, AdaptedLayer]:
        """Name -> inner layer that has adapters."""
        assert isinstance(self.kind, Composite)
        modules = self.wrapped_module()._modules
        return {name: layer for name in self.kind.layers if isinstance(layer := modules.get(name), AdaptedLayer)}

    def _adapted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active = self.active_state.current()
        module = self.wrapped_module()
        if active.rows is not None:
            raise AdapterError(
                f"{self._get_name()} does not support mixed adapter batches: adapter {active.rows.names[0]!r} adapts "
                f"a {type(module).__name__:.60}, so use a separate batch for each adapter"
            )
        own = self.with_adapters(active)
        modules = {name: _with_adapters(layer, active) for name, layer in self._layers().items()}
        return twin_of(module, {} if own is None else {self.parameter_name: own.summed()}, modules)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        kind = self.__dict__.get("kind")
        if name in getattr(kind, "private", ()):
            return getattr(self.wrapped_module(), name)
        if name in getattr(kind, "layers", ()):  # as in PEFT the frozen layer, because only its weight is read
            inner = getattr(self.wrapped_module(), name)
            return inner.wrapped_module() if isinstance(inner, AdaptedLayer) else inner
        return super().__getattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = CompositeReplica
        return replica


class CompositeReplica(AdaptedComposite):
    """A replica made by ``nn.DataParallel``; see ``LayerReplica``."""

    def show_adapters(self) -> None:
        """Does nothing: a replica is never changed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in (self, *self._layers().values()):
            use_shown(layer.adapters._modules, layer._modules)
        return super().forward(*args, **kwargs)


def _with_adapters(layer: AdaptedLayer, active: ActiveAdapters) -> nn.Module:
    """The frozen layer, or a shallow copy whose weight includes the deltas if an adapter is active."""
    base = layer.own_base()
    weight = factored_weight(layer, base, active)
    return base.module if weight is None else twin_of(base.module, {"weight": weight.summed()})
