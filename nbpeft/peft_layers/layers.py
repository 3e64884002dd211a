"""PEFT's attributes and methods of adapted layers: mappings by adapter name that read and write the adapters.

layer.scaling["default"] = 2.0        layer.merged_adapters        layer.set_scale("default", 0.5)

The attributes that a method declares, such as ``layer.r`` or ``layer.core["default"].weight``, are in ``engine.views``.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nbpeft.engine.changes.active_state import LayerState
from nbpeft.engine.contract.adapter import Adapter, Rescales, TransformsInput, delta_of, source_of, unconvertible_reason
from nbpeft.engine.contract.base import Backend, BaseLayer
from nbpeft.engine.contract.registry import backend_named, method_of_adapter
from nbpeft.engine.views.layer_attributes import PerAdapterView
from nbpeft.engine.wrappers.extension import add_attributes
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter
from nbpeft.errors import MergeError, UnknownAdapterError, did_you_mean
from nbpeft.peft_layers.commands import one_or_all
from nbpeft.peft_layers.layer_types import title_of

_scalings: WeakKeyDictionary[nn.Module, PerAdapterView] = WeakKeyDictionary()
"""Layer -> its last ``scaling`` view; not stored on the layer, which may be copied and pickled."""


class _EmptyOnClass(property):
    """A property whose value on the class itself is an empty tuple, as on PEFT's base class."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return () if instance is None else super().__get__(instance, owner)


class _Merged(list[str]):
    """The adapters that are merged into a layer; the list can be emptied, and is not changed otherwise."""

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__(layer.merged_names)
        self._layer = layer

    def __reduce__(self) -> Any:
        return list, ([*self],)

    def _become(self, names: Sequence[str]) -> None:
        if list(names) == list(self._layer.merged_names):
            return
        if names:
            raise MergeError(
                f"merged_adapters of a layer is {list(self)} and can only be emptied, which keeps the merged weight: "
                "call merge() and unmerge()"
            )
        self._layer._commands().keep_merged(self._layer)
        super().clear()

    def __setitem__(self, key: Any, value: Any) -> None:
        changed = [*self]
        changed[key] = value
        self._become(changed)

    def __delitem__(self, key: Any) -> None:
        changed = [*self]
        del changed[key]
        self._become(changed)

    def clear(self) -> None:
        """Keeps the merged weight for good."""
        self._become([])

    def pop(self, index: Any = -1) -> str:
        """Returns the only name and keeps the merged weight for good."""
        name: str = self[index]
        del self[index]
        return name

    def remove(self, name: str) -> None:
        """Keeps the merged weight for good, if this is the only name."""
        del self[self.index(name)]

    def append(self, name: str) -> None:
        """Refuses a name that is not merged."""
        self._become([*self, name])


class PeftLayer(AdaptedLayer):
    """PEFT's attributes and methods of every adapted layer; see ``add_attributes``."""

    @property
    def scaling(self) -> PerAdapterView:
        """Adapter name -> scaling of its delta; can be written to change the scaling on this layer."""
        view = _scalings.get(self)
        if view is None:
            view = _scalings[self] = PerAdapterView(
                self._named(), "scaling", lambda adapter: adapter.scaling, lambda adapter, value: adapter.rescale(value)
            )
        return view

    @scaling.setter
    def scaling(self, values: MutableMapping[str, Any]) -> None:
        own: Any = self.scaling
        given = dict(values)
        if values is not own:
            # Some callers save the mapping, assign another one, and assign the saved one again to restore its values.
            # So the previous view must not follow the adapters any more.
            own.keep()
            del _scalings[self]
        if isinstance(values, PerAdapterView) and values.is_of(self._named()):
            _scalings[self] = values
            values.resume()
        for name, value in given.items():
            self.scaling[name] = value

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's scaling to ``scale`` times its trained scaling; ignored if the layer lacks the adapter."""
        found = self._named().get(adapter)
        if isinstance(found, Rescales):
            found.rescale(found.trained_scaling * scale)
        else:
            self._warn_without_scaling([adapter], scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scalings of the active adapters on this layer by a factor."""
        self._warn_without_scaling(self.active_adapters, scale)
        for adapter in self._rescalable():
            adapter.rescale(float(adapter.scaling) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scalings of the active adapters on this layer; None restores their trained scalings."""
        for adapter in self._rescalable():
            adapter.rescale(adapter.trained_scaling if scale is None else float(adapter.scaling) / scale)

    def _warn_without_scaling(self, names: Sequence[str], scale: float) -> None:
        """Warns if one of the adapters here has no scaling, so that a scale other than 1 has no effect on it."""
        own = self._named()
        for name in [] if scale == 1 else [name for name in names if name in own]:
            method = None if isinstance(own[name], Rescales) else method_of_adapter(own[name])
            if method is not None and method.shares.companion is None:  # PEFT ignores the token rows of another adapter
                message = f"a scale of {scale:g} has no effect on adapter {name!r}: {method.label} has no scaling"
                warnings.warn(message, stacklevel=3)

    def _rescalable(self) -> list[Rescales]:
        """Returns the active adapters on this layer that have a scaling."""
        active = [self._named().get(name) for name in self.active_adapters]
        return [adapter for adapter in active if isinstance(adapter, Rescales)]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the model's active adapters; if the layer only has trainable tokens, of those on this layer."""
        return [name for name in self.chosen_names() if name in self._named() or not self._has_tokens_alone]

    def _get_available_adapters(self) -> set[str]:
        """Returns the names of the adapters on this layer."""
        return set(self._named())

    @property
    def active_adapter(self) -> str | list[str]:
        """Names of the active adapters; a single name if the layer only has trainable tokens, as in PEFT's wrapper."""
        return one_or_all(self.active_adapters) if self._has_tokens_alone else self.active_adapters

    @property
    def _has_tokens_alone(self) -> bool:
        return all(adapter.peft.container for adapter in self._named().values())

    @property
    def is_feedforward(self) -> bool:
        """Whether the (IA)³ adapters here scale the layer's input, and not its output.

        Raises:
            AttributeError: there are none.
        """
        for adapter in self._named().values():
            method = method_of_adapter(adapter)
            if method is not None and method.peft_type == "IA3":
                return isinstance(adapter, TransformsInput)
        raise AttributeError("the layer has no (IA)³ adapter, so there is no is_feedforward")

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are disabled."""
        return not self.active_state.current().names

    @_EmptyOnClass
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the layer's attributes with adapters' parameters."""
        if not self._named():
            return self._names_when_empty(0)
        return tuple(dict.fromkeys(name for adapter in self._named().values() for name in _mapping_names(adapter)))

    @_EmptyOnClass
    def other_param_names(self) -> tuple[str, ...]:
        """Names of the layer's attributes with other settings of adapters."""
        if not self._named():
            return self._names_when_empty(1)
        found: dict[str, None] = {}
        for adapter in self._named().values():
            found.update(dict.fromkeys((*adapter.peft.attributes, *adapter.peft.modules)))
            found.update({"scaling": None} if isinstance(adapter, Rescales) else {})
        return tuple(found)

    def _names_when_empty(self, kind: int) -> tuple[str, ...]:
        names = ((method.peft.parameters, method.peft.others)[kind] for method in self._methods())
        return tuple(name for several in names for name in several.split())

    def _all_available_adapter_names(self) -> list[str]:
        """Returns the sorted names of all adapters on the layer; other libraries call it."""
        return sorted(self._named())

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from this layer; has no effect if the layer lacks it.

        If the layer owns tensors that other layers of the adapter share, they move to one of these layers. If no active
        adapter is left on this layer, its oldest adapter becomes active here.

        Raises:
            AdapterError: another layer uses the adapter's tensors of this layer (``ensure_weight_tying``).
            MergeError: it is merged here.
        """
        if adapter_name not in self._named():
            return
        before = self.chosen_names()
        self._commands().remove(self, adapter_name)
        active = [name for name in before if name != adapter_name]
        oldest = next(iter(self._named()), None)
        if active == before:
            return
        if oldest is not None and not any(name in self._named() for name in active):
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {oldest}.",
                stacklevel=2,
            )
            self.set_adapter(oldest)
        elif isinstance(self.active_state, LayerState):
            self._activate_alone(active, enabled=self.active_state.enabled)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters into the weight of this layer.

        Args:
            safe_merge: refuse a weight that would not be finite.
            adapter_names: the adapters; None for the active ones.
        """
        names = self.chosen_names() if adapter_names is None else list(adapter_names)
        new = [name for name in names if name in self._named() and name not in self.merged_names]
        if not new:
            if self.merged_names:
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self._commands().merge(self, new, safe=safe_merge)

    def unmerge(self) -> None:
        """Restores the frozen weight of this layer, bit for bit."""
        if not self.merged_names:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        self._commands().unmerge(self)

    def get_base_weight(self) -> Tensor:
        """Returns the layer's weight as stored, detached; dequantized if it is quantized."""
        return self.base.backend.dequantize(self.base.module).detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Writes the layer's frozen weight, in its dtype, or quantized with the layer's settings.

        Args:
            weight_data: the new values, shaped like ``get_base_weight()``.

        Raises:
            MergeError: adapters are merged, or the backend cannot write its weights.
            BaseMismatchError: the shape differs.
        """
        self._commands().set_base_weight(self, weight_data)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether an adapter on this layer can be converted to LoRA; False if the layer lacks it."""
        found = self._named().get(adapter_name)
        return found is not None and not unconvertible_reason(found, self.base)

    @property
    def quantization_backend(self) -> Backend | None:
        """The backend of the layer's quantized weight, with its ``backend_name``; None if it is not quantized."""
        backend: Backend = self.base.backend
        return backend if backend.backend_name else None

    @quantization_backend.setter
    def quantization_backend(self, backend: Backend | None) -> None:
        chosen = backend_named("dense") if backend is None else backend
        self.__dict__["backend"] = chosen
        self.__dict__["base"] = BaseLayer(self.base.module, self.kind, chosen, adapters=self._named())

    def extra_repr(self) -> str:
        """Returns the settings that ``repr`` shows."""
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the layer stores its weight as (in, out), as transformers' ``Conv1D`` does."""
        return self.base.kind.name == "conv1d"

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer; emptying the list keeps the merged weight for good.

        Training scripts that merge and start the factors again at intervals (ReLoRA) empty it.
        """
        return _Merged(self)

    @merged_adapters.setter
    def merged_adapters(self, names: Sequence[str]) -> None:
        _Merged(self)[:] = names

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into this layer."""
        return bool(self.merged_names)

    @property
    def adapted_as(self) -> str:
        """PEFT's class name for this layer, such as ``lora.Linear`` or ``lora.Linear4bit``."""
        return title_of(self._methods(), self.base.kind, self.base.backend)

    def _get_name(self) -> str:
        return self.adapted_as

    @property
    def in_features(self) -> int:
        """Features, channels or ids of the input."""
        return self.base.in_features

    @in_features.setter
    def in_features(self, count: int) -> None:
        self.get_base_layer().in_features = count  # type: ignore[assignment]

    @property
    def out_features(self) -> int:
        """Features or channels of the output."""
        return self.base.out_features

    @out_features.setter
    def out_features(self, count: int) -> None:
        self.get_base_layer().out_features = count  # type: ignore[assignment]

    def get_base_layer(self) -> nn.Module:
        """Returns the frozen layer; for an adapted parameter, the module that owns it, inside all wrappers."""
        return self.wrapped_module()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the delta that merging an adapter adds to the weight, in the stored orientation, detached.

        Raises:
            UnknownAdapterError: the layer does not have the adapter.
        """
        found = self._named().get(adapter)
        if found is None:
            names = ", ".join(map(repr, self._named()))
            raise UnknownAdapterError(
                f"this layer has no adapter {adapter!r}, but: {names}." + did_you_mean(adapter, self._named())
            )
        return self.base.kind.canonical(self.base.module, delta_of(found, self.base.weight(), self.base))


class PeftParameter(AdaptedParameter):
    """PEFT's attributes of an adapted parameter."""

    def get_param(self) -> Tensor:
        """Returns the frozen parameter."""
        found: Tensor = getattr(self.wrapped_module(), self.parameter_name)
        return found

    @property
    def num_experts(self) -> int:
        """Number of matrices in the parameter."""
        view: Any = self.weight_module
        return int(view.count)

    def extra_repr(self) -> str:
        """Returns the parameter's name and the settings of the layer."""
        return ", ".join(filter(None, (f"parameter_name={self.parameter_name!r}", AdaptedLayer.extra_repr(self))))


def _mapping_names(adapter: Adapter) -> tuple[str, ...]:
    """Returns the names of a layer's attributes with an adapter's parameters, as in PEFT's layers."""
    peft = adapter.peft
    source = source_of(adapter)
    if source is not None and peft.mappings:
        return _mapping_names(source)
    own = dict.fromkeys(peft.grouped.get(name, name).partition(".")[0] for name in adapter._parameters)
    return tuple(name for name in peft.mappings if name not in peft.modules) or tuple(own)


add_attributes(AdaptedLayer, PeftLayer)
add_attributes(AdaptedParameter, PeftParameter)
