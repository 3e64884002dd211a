"""AdaptedBlock: the wrapper around a block whose input a side network changes.

The wrapper only shows the adapters' modules for the block where PEFT has them. The block itself has the hooks with
which they compute (``calls.side_network``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nbpeft.engine.changes.active_state import ActiveState, LayerState
from nbpeft.engine.contract.model_adapter import HasSideNetwork
from nbpeft.engine.contract.registry import Method, method_of_adapter
from nbpeft.engine.views.layer_attributes import by_name
from nbpeft.engine.views.own_modules import show_all
from nbpeft.engine.views.shows_adapters import ShowsAdapters
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.wrapper import Wrapper


class AdaptedBlock(ShowsAdapters, Wrapper):
    """A frozen block. Attributes that the wrapper lacks, except private ones, are read from the block.

    Attributes:
        base_layer: the block.
        layer: the layer that has the adapters.
        path: path of the block in the base model.
    """

    base_layer: nn.Module
    layer: AdaptedLayer
    path: str

    def __init__(self, base_layer: nn.Module, layer: AdaptedLayer, path: str) -> None:
        super().__init__()
        self.__dict__["_modules"]["base_layer"] = base_layer
        self.__dict__.update(layer=layer, path=path, training=base_layer.training)
        self.show_adapters()

    @property
    def active_state(self) -> ActiveState | LayerState:  # type: ignore[override]
        """Which adapters are active: the state of the layer that has them."""
        return self.layer.active_state

    def _activate_alone(self, names: Sequence[str], *, enabled: bool) -> None:
        self.layer._activate_alone(names, enabled=enabled)

    def _named(self) -> dict[str, Any]:
        """Adapter name -> its modules for this block."""
        adapters = dict(self.layer.adapters._modules)
        return {
            name: adapter.get_submodule(self.path)
            for name, adapter in adapters.items()
            if isinstance(adapter, HasSideNetwork) and self.path in adapter.places
        }

    def _methods(self) -> list[Method]:
        """The methods of the adapters that change the block."""
        adapters: Any = self.layer.adapters._modules
        found = [method_of_adapter(adapters[name]) for name in self._named()]
        return [method for method in found if method is not None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the block."""
        return self.base_layer(*args, **kwargs)

    def show_adapters(self) -> None:
        holders: dict[str, dict[str, dict[str, Any]]] = {}
        for name, block in self._named().items():
            for own in block._modules:
                holders.setdefault(own, {})[name] = block._modules
        show_all(self._modules, holders)

    def __getattr__(self, name: str) -> Any:
        modules: dict[str, Any] = self.__dict__.get("_modules", {})
        if name in modules and name != "base_layer":
            self.show_adapters()
        if name in modules or name.startswith("_") or "base_layer" not in modules:
            return super().__getattr__(name)
        found = by_name(self.layer.adapters._modules, name)
        return getattr(modules["base_layer"], name) if found is None else found
