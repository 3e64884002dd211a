"""An adapted layer as users of PEFT know it: attributes by adapter name that read and write the adapters.

layer.scaling["default"] = 2.0        layer.lora_A["default"].weight        layer.set_scale("default", 0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from nbpeft.engine.adapter import Adapter
from nbpeft.engine.base import Base
from nbpeft.engine.registry import family_of
from nbpeft.engine.switch import Switch
from nbpeft.engine.transaction import Transaction
from nbpeft.errors import UnknownAdapterError, did_you_mean

_WHOLE = ("lora_embedding_A", "lora_embedding_B")
"""Parameters that PEFT keeps as they are; it keeps the others inside a module, as its ``weight``."""

_BEHIND = {"r": "factor_names", "lora_dropout": "dropout"}
"""Names of PEFT that say of an adapter what another attribute of it tells."""

_TRAINED_SCALING = "trained_scaling"

_KINDS = {
    "linear": "Linear",
    "conv1d": "Linear",
    "embedding": "Embedding",
    "convolution1d": "Conv1d",
    "convolution2d": "Conv2d",
    "convolution3d": "Conv3d",
    "bnb4bit": "Linear4bit",
    "bnb8bit": "Linear8bitLt",
}
"""What PEFT calls layers of a host, or with a weight of a backend."""


class ByName(MutableMapping[str, Any]):
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


class FactorView:
    """A parameter in PEFT's spelling: ``layer.lora_A["default"].weight``; ``bias`` is that of ``lora_bias``."""

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


class DropoutView:
    """An adapter's dropout in PEFT's spelling: ``layer.lora_dropout["default"].p``."""

    __slots__ = ("_adapter",)

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    @property
    def p(self) -> float:
        """The probability."""
        return float(self._adapter.dropout)

    @p.setter
    def p(self, value: float) -> None:
        self._adapter.dropout = float(value)

    def __repr__(self) -> str:
        return f"Dropout(p={self.p:g})"


def _set_parameter(adapter: Adapter, name: str, value: Tensor) -> None:
    held = adapter._parameters.get(name)
    if held is None or value.shape != held.shape:
        wanted = "nothing" if held is None else str(tuple(held.shape))
        raise ValueError(f"{name} must have shape {wanted}, not {tuple(value.shape)}")
    adapter._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def write_scaling(adapter: Any, scaling: float | Tensor) -> None:
    """Changes an adapter's scaling, in place where it is held as a tensor; its trained one stays known."""
    held = adapter.scaling
    adapter.__dict__.setdefault(_TRAINED_SCALING, float(held))
    if isinstance(held, Tensor):
        held.fill_(float(scaling))
    else:
        adapter.__dict__["scaling"] = float(scaling)


def keep_scaling(adapter: Any, change: Transaction) -> None:
    """Records an adapter's scaling."""
    change.keep_attributes(adapter, "scaling", _TRAINED_SCALING)
    held = adapter.scaling
    if isinstance(held, Tensor):
        change.keep_values([held])


def trained_scaling(adapter: Any) -> float:
    """The scaling its config asks for, whatever was written since."""
    return float(adapter.__dict__.get(_TRAINED_SCALING, adapter.scaling))


def forget_scaling(adapter: Any) -> None:
    """Takes the present scaling for the trained one, as after a swap."""
    adapter.__dict__.pop(_TRAINED_SCALING, None)


class LayerFace(nn.Module):
    """PEFT's attributes and methods of one adapted layer; ``AdaptedLayer`` is one."""

    base: Base
    switch: Switch
    merged: tuple[str, ...]

    def _named(self) -> dict[str, Any]:
        found: dict[str, Any] = self.__dict__["_modules"]["adapters"]._modules
        return found

    @property
    def scaling(self) -> ByName:
        """Adapter name -> factor on its product; writing it changes how strongly the adapter acts here."""
        return ByName(self._named(), "scaling", lambda adapter: adapter.scaling, write_scaling)

    @scaling.setter
    def scaling(self, values: MutableMapping[str, Any]) -> None:
        own = self.scaling
        for name, value in values.items():
            own[name] = value

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's scaling here to ``scale`` times its trained one; nothing for one that is not here."""
        found = self._named().get(adapter)
        if found is not None and _has(found, "scaling"):
            write_scaling(found, trained_scaling(found) * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scalings of the active adapters here."""
        for adapter in self._acting():
            write_scaling(adapter, float(adapter.scaling) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scalings of the active adapters here; without a factor they are the trained ones again."""
        for adapter in self._acting():
            write_scaling(adapter, trained_scaling(adapter) if scale is None else float(adapter.scaling) / scale)

    def _acting(self) -> list[Any]:
        """The adapters here that act now and have a scaling, as trained token rows have none."""
        scaling = self.scaling
        return [self._named()[name] for name in self.active_adapters if name in scaling]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(self.switch.current().names)

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
        found = (family_of(adapter) for adapter in self._named().values())
        families = sorted({family.lower() for family in found if family is not None})
        layer = _KINDS.get(self.base.backend.name) or _KINDS.get(self.base.host.name) or type(self.base.module).__name__
        return f"{'/'.join(families)}.{layer}" if families else "TrainableTokensLayer"

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
        return self.base.host.canonical(self.base.module, delta).detach()


def by_name(adapters: dict[str, Any], name: str) -> ByName | None:
    """An attribute that some adapters of a layer have, in PEFT's spelling; None if none of them has it.

    Args:
        adapters: adapter name -> adapter.
        name: ``lora_A``, ``lora_magnitude_vector``, ``r``, ``lora_dropout``, or any attribute of an adapter.
    """
    if name.startswith("_") or name == "training":
        return None
    attribute = _BEHIND.get(name, name)
    having = [adapter for adapter in adapters.values() if _has(adapter, attribute)]
    if not having:
        return None
    if name == "r":
        return ByName(adapters, attribute, lambda adapter: int(adapter.trained_factors[0].shape[0]))
    if name == "lora_dropout":
        return ByName(adapters, attribute, DropoutView)
    if name not in having[0]._parameters:
        return ByName(adapters, name, lambda adapter: adapter.__dict__[name], lambda a, value: setattr(a, name, value))
    if name in _WHOLE:
        return ByName(adapters, name, lambda a: a._parameters[name], lambda a, value: _set_parameter(a, name, value))
    return ByName(adapters, name, lambda adapter: FactorView(adapter, name))


def _has(adapter: nn.Module, attribute: str) -> bool:
    return attribute in adapter._parameters or attribute in adapter.__dict__
