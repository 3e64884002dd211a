"""An adapted layer as users of PEFT know it: attributes by adapter name that read and write the adapters.

layer.scaling["default"] = 2.0        layer.core["default"].weight        layer.set_scale("default", 0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from nbpeft.engine.active_state import ActiveState
from nbpeft.engine.adapter import Adapter, Rescales
from nbpeft.engine.base import BaseLayer
from nbpeft.engine.registry import method_of_adapter
from nbpeft.errors import UnknownAdapterError, did_you_mean


class PerAdapterView(MutableMapping[str, Any]):
    """One attribute of the adapters of a layer, by adapter name; also ``view.default`` for ``view["default"]``.

    Args:
        adapters: the layer's adapters by name, looked up anew each time.
        attribute: those that have it are in the view.
        read: its value.
        write: sets it; without this it cannot be set.
    """

    def __init__(
        self,
        adapters: dict[str, Any],
        attribute: str,
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self.__dict__.update(_adapters=adapters, _attribute=attribute, _read=read, _write=write)

    def _adapter(self, name: str) -> Any:
        adapter = self.__dict__["_adapters"][name]
        if not _has(adapter, self.__dict__["_attribute"]):
            raise KeyError(name)
        return adapter

    def __getitem__(self, name: str) -> Any:
        return self.__dict__["_read"](self._adapter(name))

    def __setitem__(self, name: str, value: Any) -> None:
        write = self.__dict__["_write"]
        if write is None:
            raise TypeError("this attribute of an adapter cannot be set; write its weight in place")
        write(self._adapter(name), value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("use delete_adapter() to take an adapter out")

    def __iter__(self) -> Iterator[str]:
        attribute = self.__dict__["_attribute"]
        return iter([name for name, adapter in self.__dict__["_adapters"].items() if _has(adapter, attribute)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no adapter {name!r} here; there are {', '.join(map(repr, self)) or 'none'}")

    def copy(self) -> dict[str, Any]:
        """A dictionary of what it holds now."""
        return dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))


class ParameterView:
    """A parameter in PEFT's spelling: ``layer.core["default"].weight``; ``bias`` is that of ``lora_bias``."""

    __slots__ = ("_adapter", "_name")

    def __init__(self, adapter: Adapter, name: str) -> None:
        self._adapter = adapter
        self._name = name

    @property
    def weight(self) -> Any:
        """The parameter itself."""
        return self._adapter._parameters[self._name]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        _set_parameter(self._adapter, self._name, value)

    @property
    def bias(self) -> Any:
        """The bias behind the parameter, or None."""
        return self._adapter._parameters.get(f"{self._name}_bias")

    @bias.setter
    def bias(self, value: Tensor) -> None:
        _set_parameter(self._adapter, f"{self._name}_bias", value)

    def __repr__(self) -> str:
        return f"{self._name}: {tuple(self.weight.shape)}"


def _set_parameter(adapter: Adapter, name: str, value: Tensor) -> None:
    held = adapter._parameters.get(name)
    if held is None or value.shape != held.shape:
        wanted = "nothing" if held is None else str(tuple(held.shape))
        raise ValueError(f"{name} must have shape {wanted}, not {tuple(value.shape)}")
    adapter._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)


class PeftLayerMixin(nn.Module):
    """PEFT's attributes and methods of one adapted layer; ``AdaptedLayer`` is one."""

    base: BaseLayer
    active_state: ActiveState
    merged: tuple[str, ...]

    def _named(self) -> dict[str, Any]:
        found: dict[str, Any] = self.__dict__["_modules"]["adapters"]._modules
        return found

    @property
    def scaling(self) -> PerAdapterView:
        """Adapter name -> factor on what it adds; writing it changes how strong the adapter is on this layer."""
        return PerAdapterView(
            self._named(), "scaling", lambda adapter: adapter.scaling, lambda adapter, value: adapter.rescale(value)
        )

    @scaling.setter
    def scaling(self, values: MutableMapping[str, Any]) -> None:
        own = self.scaling
        for name, value in values.items():
            own[name] = value

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's scaling here to ``scale`` times its trained one; nothing for one that is not here."""
        found = self._named().get(adapter)
        if isinstance(found, Rescales):
            found.rescale(found.trained_scaling * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scalings of the active adapters here."""
        for adapter in self._rescalable():
            adapter.rescale(float(adapter.scaling) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scalings of the active adapters here; without a factor they are the trained ones again."""
        for adapter in self._rescalable():
            adapter.rescale(adapter.trained_scaling if scale is None else float(adapter.scaling) / scale)

    def _rescalable(self) -> list[Rescales]:
        """The active adapters here that have a scaling."""
        active = [self._named().get(name) for name in self.active_adapters]
        return [adapter for adapter in active if isinstance(adapter, Rescales)]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(self.active_state.current().names)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the adapters that act now."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the frozen layer acts alone now."""
        return not self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer."""
        return list(self.merged)

    @property
    def adapted_as(self) -> str:
        """What PEFT calls such a layer, as ``lora.Linear`` or ``lora.Linear4bit``."""
        methods = [found for adapter in self._named().values() if (found := method_of_adapter(adapter)) is not None]
        own = sorted({method.peft_type.lower() for method in methods if not method.layer_name})
        layer = self.base.backend.peft_name or self.base.kind.peft_name
        return f"{'/'.join(own)}.{layer}" if own or not methods else methods[0].layer_name

    def _get_name(self) -> str:
        return self.adapted_as

    @property
    def in_features(self) -> int:
        """Features, channels or ids of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Features or channels of the output."""
        return self.base.out_features

    def get_base_layer(self) -> nn.Module:
        """The frozen layer."""
        layer: nn.Module = self.__dict__["_modules"]["base_layer"]
        return layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging an adapter would add to the weight, in the orientation of the stored one, detached.

        Raises:
            UnknownAdapterError: there is no such adapter on this layer.
        """
        found = self._named().get(adapter)
        if found is None:
            have = ", ".join(map(repr, self._named()))
            raise UnknownAdapterError(
                f"no adapter {adapter!r} on this layer; there is: {have}." + did_you_mean(adapter, self._named())
            )
        delta: Tensor = found.delta_weight(self.base.weight(), self.base)
        return self.base.kind.canonical(self.base.module, delta).detach()


def by_name(adapters: dict[str, Any], name: str) -> PerAdapterView | None:
    """An attribute of adapted layers that PEFT knows; None if no adapter of a layer has it.

    Args:
        adapters: adapter name -> adapter.
        name: a parameter's, or one of ``Adapter.peft_attributes``.
    """
    for adapter in adapters.values():
        if isinstance(adapter, Adapter) and name in adapter.peft_attributes:
            return PerAdapterView(adapters, adapter.peft_attributes[name], attrgetter(adapter.peft_attributes[name]))
    having = [adapter for adapter in adapters.values() if name in adapter._parameters]
    if not having:
        return None
    if name not in having[0].wrapped_parameters:
        return PerAdapterView(
            adapters, name, lambda a: a._parameters[name], lambda a, value: _set_parameter(a, name, value)
        )
    return PerAdapterView(adapters, name, lambda adapter: ParameterView(adapter, name))


def attribute_by_name(adapters: dict[str, Any], name: str) -> PerAdapterView | None:
    """Any other attribute that adapters of a layer carry; None if none does.

    Args:
        adapters: adapter name -> adapter.
        name: the attribute's.
    """
    if name.startswith("_") or name == "training" or not any(name in a.__dict__ for a in adapters.values()):
        return None
    return PerAdapterView(
        adapters, name, lambda adapter: adapter.__dict__[name], lambda a, value: setattr(a, name, value)
    )


def _has(adapter: nn.Module, attribute: str) -> bool:
    return attribute in adapter._parameters or attribute in adapter.__dict__ or hasattr(type(adapter), attribute)


class _LayerType(type):
    """The type of layers that carry adapters of one method, for ``isinstance``."""

    peft_type: str

    def __instancecheck__(cls, layer: object) -> bool:
        if not isinstance(layer, PeftLayerMixin):
            return False
        methods = (method_of_adapter(adapter) for adapter in layer._named().values())
        return any(method is not None and method.peft_type == cls.peft_type for method in methods)


def layer_type(peft_type: str, name: str) -> type[Any]:
    """A class for ``isinstance``: adapted layers that carry adapters of a method, as PEFT's ``LoraLayer``."""
    doc = f"Adapted layers with adapters of type {peft_type}; for ``isinstance`` only."
    return _LayerType(name, (), {"peft_type": peft_type, "__doc__": doc})
