"""PEFT's attributes and methods of adapted layers: mappings by adapter name that read and write the adapters.

layer.scaling["default"] = 2.0        layer.r["default"]        layer.set_scale("default", 0.5)

Parameters, as in ``layer.core["default"].weight``, are in ``peft_modules``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, NoReturn, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nbpeft.engine.changes.active_state import ActiveState, LayerState
from nbpeft.engine.contract.adapter import Adapter, Rescales
from nbpeft.engine.contract.base import Backend, BaseLayer
from nbpeft.engine.contract.registry import Method, method_of_adapter, methods_of_type
from nbpeft.errors import CheckpointError, UnknownAdapterError, did_you_mean


class PerAdapterView(MutableMapping[str, Any], dict[str, Any]):  # type: ignore[metaclass,misc]
    """One attribute of the adapters of a layer, by adapter name; also ``view.default`` for ``view["default"]``.

    It is a ``dict`` for ``isinstance``, but stores nothing: values are read from the adapters on each access, until
    another dictionary replaces the view.

    Args:
        adapters: the layer's adapters by name, looked up on each access.
        attribute: name of the attribute; the view contains the adapters that have it.
        read: returns the attribute of an adapter.
        write: sets the attribute; None if it is read-only.
    """

    def __init__(
        self,
        adapters: dict[str, Any],
        attribute: str,
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self.__dict__.update(_adapters=adapters, _attribute=attribute, _read=read, _write=write, _kept=None)
        # The json module writes "{}" for a dictionary whose own storage is empty, without calling ``items``.
        dict.__setitem__(self, "", None)  # type: ignore[index]

    def keep(self) -> None:
        """Stores the current values, and no longer reads or writes the adapters."""
        self.__dict__["_kept"] = {key: one.clone() if isinstance(one, Tensor) else one for key, one in self.items()}

    def resume(self) -> None:
        """Reads and writes the adapters again."""
        self.__dict__["_kept"] = None

    def is_of(self, adapters: dict[str, Any]) -> bool:
        """Whether the view is of these adapters."""
        return self.__dict__["_adapters"] is adapters

    def _adapter(self, name: str) -> Any:
        adapter = self.__dict__["_adapters"][name]
        if not _has(adapter, self.__dict__["_attribute"]):
            raise KeyError(name)
        return adapter

    def __getitem__(self, name: str) -> Any:
        kept = self.__dict__["_kept"]
        return self.__dict__["_read"](self._adapter(name)) if kept is None else kept[name]

    def __setitem__(self, name: str, value: Any) -> None:
        write, kept = self.__dict__["_write"], self.__dict__["_kept"]
        if kept is not None:
            kept[name] = value
        elif write is None:
            raise TypeError("this attribute of an adapter cannot be set; write its weight in place")
        else:
            write(self._adapter(name), value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("use delete_adapter() to take an adapter out")

    def __iter__(self) -> Iterator[str]:
        attribute, kept = self.__dict__["_attribute"], self.__dict__["_kept"]
        if kept is not None:
            return iter([*kept])
        return iter([name for name, adapter in self.__dict__["_adapters"].items() if _has(adapter, attribute)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no adapter {name!r} here; there are {', '.join(map(repr, self)) or 'none'}")

    def copy(self) -> dict[str, Any]:
        """The current values as a dictionary."""
        return dict(self)

    # Methods that dict has and Mapping lacks would read the dictionary's own storage, which is for json only.

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | dict(self)

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return repr(dict(self))


def one_or_all(names: list[str]) -> str | list[str]:
    """The name if there is only one, else the list, as in PEFT's ``active_adapter``."""
    return names[0] if len(names) == 1 else names


class ChoosesAlone(nn.Module):
    """PEFT's commands on a single module with adapters; the next command on the model overrides its activation."""

    active_state: ActiveState | LayerState

    def _named(self) -> dict[str, Any]:
        """Adapter name -> the adapter's module here."""
        raise NotImplementedError

    @property
    def adapters_enabled(self) -> bool:
        """Whether adapters are enabled on this module."""
        state: Any = self.__dict__["active_state"]
        return bool(state.enabled if isinstance(state, LayerState) else self._commands().manager.enabled)

    def _commands(self) -> Any:
        """The ``LayerCommands`` of the model."""
        return self._shared_state().layer_commands

    def _shared_state(self) -> ActiveState:
        state: Any = self.__dict__["active_state"]
        return getattr(state, "shared", state)  # type: ignore[no-any-return]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates adapters on this module, trainable unless ``inference_mode``; the module's others are frozen.

        Args:
            adapter_names: one name or several; names without an adapter here are ignored.
            inference_mode: freeze the active adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._act_alone(names, enabled=True)
        for name, adapter in self._named().items():
            adapter.requires_grad_(name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables the adapters on this module; disabling also freezes them."""
        self._act_alone(self.chosen_names(), enabled=enabled)
        for name, adapter in self._named().items():
            adapter.requires_grad_(enabled and name in self.chosen_names())

    @property
    def _active_adapter(self) -> str | list[str]:
        """Where PEFT keeps what is active; libraries read and write it."""
        return one_or_all(self.chosen_names())

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self._act_alone([names] if isinstance(names, str) else list(names), enabled=self.adapters_enabled)

    @property
    def _disable_adapters(self) -> bool:
        """Likewise, whether the active adapters are off."""
        return not self.adapters_enabled

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self._act_alone(self.chosen_names(), enabled=not disabled)

    def chosen_names(self) -> list[str]:
        """Names of the active adapters here, whether or not they are enabled."""
        state: Any = self.__dict__["active_state"]
        return list(state.names if isinstance(state, LayerState) else self._commands().chosen)

    def _act_alone(self, names: Sequence[str], *, enabled: bool) -> None:
        shared = self._shared_state()
        shared.refuse_changes()
        now = shared.current().names
        alike = tuple(names) == now if enabled else not now
        self.__dict__["active_state"] = shared if alike else LayerState(shared, names, enabled=enabled)
        (shared.apart.discard if alike else shared.apart.add)(self)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether adapters here get gradients, whichever adapters are active."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self._named():
                self._named()[name].requires_grad_(requires_grad)


_scalings: WeakKeyDictionary[nn.Module, PerAdapterView] = WeakKeyDictionary()
"""Layer -> its last ``scaling`` view; not stored on the layer, which may be copied and pickled."""


class _OfInstances(property):
    """A property that is an empty tuple on the class itself, as in PEFT's base class."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return () if instance is None else super().__get__(instance, owner)


class PeftLayerMixin(ChoosesAlone):
    """PEFT's attributes and methods of an adapted layer; base class of ``AdaptedLayer``."""

    base: BaseLayer
    merged_names: tuple[str, ...]
    emptied_of: str = ""
    """The ``peft_type`` of the last deleted adapter, for a layer without adapters."""

    def _named(self) -> dict[str, Any]:
        found: dict[str, Any] = self.__dict__["adapters"]._modules
        return found

    def _methods(self) -> list[Method]:
        """The methods of the adapters here; for a layer without adapters, that of the last deleted adapter."""
        found = [method_of_adapter(adapter) for adapter in self._named().values()]
        return [one for one in found if one is not None] or [*methods_of_type(self.emptied_of)[:1]]

    def note_method(self) -> None:
        """Records the method of the adapters here, whose names the layer keeps when all are deleted."""
        self.__dict__["emptied_of"] = next((method.peft_type for method in self._methods()), "")

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
        if values is not own:  # callers that saved the previous mapping, to restore it later, keep its values
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
        """Multiplies the scalings of the active adapters here."""
        self._warn_without_scaling(self.active_adapters, scale)
        for adapter in self._rescalable():
            adapter.rescale(float(adapter.scaling) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scalings of the active adapters here; without a factor, restores their trained scalings."""
        for adapter in self._rescalable():
            adapter.rescale(adapter.trained_scaling if scale is None else float(adapter.scaling) / scale)

    def _warn_without_scaling(self, names: Sequence[str], scale: float) -> None:
        """Warns if one of the adapters here has no scaling, so that a scale other than 1 has no effect on it."""
        own = self._named()
        for name in [] if scale == 1 else [name for name in names if name in own]:
            method = None if isinstance(own[name], Rescales) else method_of_adapter(own[name])
            if method is not None and method.shares.companion is None:  # token rows go with another adapter, as in PEFT
                message = f"a scale of {scale:g} has no effect on adapter {name!r}: {method.label} has no scaling"
                warnings.warn(message, stacklevel=3)

    def _rescalable(self) -> list[Rescales]:
        """The active adapters here that have a scaling."""
        active = [self._named().get(name) for name in self.active_adapters]
        return [adapter for adapter in active if isinstance(adapter, Rescales)]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the model's active adapters; for a layer that has only trainable tokens, of those here."""
        return [name for name in self.chosen_names() if name in self._named() or not self._has_tokens_alone]

    @property
    def active_adapter(self) -> str | list[str]:
        """The same; for a layer that has only trainable tokens a single name, as in PEFT's wrapper of these."""
        return one_or_all(self.active_adapters) if self._has_tokens_alone else self.active_adapters

    @property
    def _has_tokens_alone(self) -> bool:
        return all(adapter.peft_container for adapter in self._named().values())

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are disabled."""
        return not self.active_state.current().names

    @_OfInstances
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the layer's attributes with adapters' parameters."""
        if not self._named():
            return self._names_when_empty(0)
        return tuple(dict.fromkeys(name for adapter in self._named().values() for name in _mapping_names(adapter)))

    @_OfInstances
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
        """Names of all adapters on the layer, sorted; called by libraries that use PEFT."""
        return sorted(self._named())

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from this layer; has no effect if the layer lacks it.

        State that its layers share moves to another layer, and is trained and saved as before. If no active adapter is
        left on this layer, its oldest adapter becomes active here.

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
            self._act_alone(active, enabled=self.active_state.enabled)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters into the weight of this layer.

        Args:
            safe_merge: refuse a weight that would not be finite.
            adapter_names: the adapters; the active ones if None.
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
        """The layer's weight as stored, detached; dequantized if it is quantized."""
        return self.base.backend.dequantize(self.base.module).detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Writes the layer's frozen weight, in its dtype, or quantized with the layer's settings.

        Args:
            weight_data: the new values, shaped like ``get_base_weight()``.

        Raises:
            MergeError: adapters are merged, or the backend cannot write its weights.
            BaseMismatchError: it has another shape.
        """
        self._commands().set_base_weight(self, weight_data)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter on this layer can be converted to a LoRA; False if the layer lacks it."""
        found = self._named().get(adapter_name)
        return found is not None and not found.unconvertible_reason(self.base)

    @property
    def quantization_backend(self) -> Backend | None:
        """The backend of the layer's quantized weight, with its ``backend_name``; None if it is not quantized."""
        backend: Backend = self.base.backend
        return backend if backend.backend_name else None

    def extra_repr(self) -> str:
        """The settings that ``repr`` shows."""
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the layer stores its weight as (in, out), as transformers' ``Conv1D`` does."""
        return self.base.kind.name == "conv1d"

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer."""
        return list(self.merged_names)

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into this layer."""
        return bool(self.merged_names)

    @property
    def adapted_as(self) -> str:
        """PEFT's class name of such a layer, such as ``lora.Linear`` or ``lora.Linear4bit``."""
        methods = self._methods()
        own = sorted({method.peft_type.lower() for method in methods if not method.peft.layer})
        layer = self.base.backend.peft_name or self.base.kind.peft_name
        prefix = methods[0].peft.layer_prefix if len(own) == 1 else ""
        return f"{'/'.join(own)}.{prefix}{layer}" if own or not methods else methods[0].peft.layer

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
        """The frozen layer."""
        layer: nn.Module = self.__dict__["_modules"]["base_layer"]
        return layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta that merging an adapter adds to the weight, in the orientation of the stored weight, detached.

        Raises:
            UnknownAdapterError: the layer does not have the adapter.
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
    """An attribute of PEFT's adapted layers; None if no adapter of the layer has it.

    Args:
        adapters: adapter name -> adapter.
        name: one of the ``attributes`` of ``PeftNames``.
    """
    for adapter in adapters.values():
        own = adapter.peft.attributes.get(name)
        if own is not None:
            return PerAdapterView(adapters, own, attrgetter(own))
    return None


def function_by_name(layer: PeftLayerMixin, name: str) -> Callable[..., Any] | None:
    """A function of PEFT's adapted layers that belongs to an adapter's method; None if there is none of that name.

    Args:
        layer: the layer.
        name: one of the ``functions`` of ``PeftNames``.
    """
    adapters = layer._named().values()
    found = (adapter.peft.functions[name] for adapter in adapters if name in adapter.peft.functions)
    return next((partial(function, layer) for function in found), None)


def attribute_by_name(adapters: dict[str, Any], name: str) -> PerAdapterView | None:
    """Any other attribute of a layer's adapters; None if no adapter has it.

    Args:
        adapters: adapter name -> adapter.
        name: name of the attribute.
    """
    if name == "training" or not any(name in a.__dict__ for a in adapters.values()):
        return None
    return PerAdapterView(
        adapters, name, lambda adapter: adapter.__dict__[name], lambda a, value: setattr(a, name, value)
    )


def _has(adapter: nn.Module, attribute: str) -> bool:
    own = attribute.partition(".")[0]
    held = (adapter._parameters, adapter._buffers, adapter.__dict__)
    return any(own in one for one in held) or hasattr(type(adapter), own)


def shared_by_name(states: dict[str, Any], name: str) -> PerAdapterView | dict[str, PerAdapterView] | None:
    """One or several tensors that adapters' layers share; None if there are none of that name.

    Args:
        states: adapter name -> the state that its layers share.
        name: name of the tensor, such as ``vera_A``, or of a module of ``SharedState.named_first``.
    """
    holders = {own: state._modules[name] for own, state in states.items() if name in state.named_first}
    if holders:
        keys = dict.fromkeys(key for holder in holders.values() for key in holder._buffers)
        return {key: PerAdapterView(holders, key, itemgetter(key)) for key in keys}
    having = {
        adapter: state
        for adapter, state in states.items()
        if name in state._parameters or name in state._buffers or name in state._modules
    }
    found = PerAdapterView(having, name, attrgetter(name), lambda state, value: attrgetter(name)(state).copy_(value))
    return found if found and name.isidentifier() else None


class LayerType(type):
    """Metaclass of PEFT's layer classes, for which ``isinstance`` is true of adapted layers.

    A class has a ``peft_type``, that of the adapters on the layers, or a ``title``, PEFT's name of the layers. A class
    derived from it has only its own instances, which ``custom_layers`` put into a model.
    """

    def __instancecheck__(cls, layer: object) -> bool:
        if type.__instancecheck__(cls, layer):
            return True
        if not isinstance(layer, PeftLayerMixin):
            return False
        if type.__instancecheck__(cls, layer.__dict__.get("custom")):
            return True
        own = vars(cls)
        if "title" in own:
            return bool(layer.adapted_as == own["title"])
        return "peft_type" in own and any(method.peft_type == own["peft_type"] for method in layer._methods())


def layer_type(peft_type: str, name: str, **attributes: Any) -> type[Any]:
    """Creates a class like PEFT's ``LoraLayer`` for ``isinstance`` checks of layers with a method's adapters.

    Args:
        peft_type: the method's PEFT type.
        name: name of the class.
        **attributes: attributes of the class.
    """
    doc = f"Adapted layers with adapters of type {peft_type}; for ``isinstance`` only."
    own = {"peft_type": peft_type, "__doc__": doc, "__setstate__": refuse_pickle_of_peft}
    return LayerType(name, (), own | attributes)


def refuse_pickle_of_peft(module: object, state: object) -> NoReturn:
    """``__setstate__`` of classes under PEFT's import names: refuses modules that were pickled by PEFT.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"a {type(module).__name__} in this file was pickled by PEFT, and its modules do not run here: load the file "
        "with PEFT, save the adapter with save_pretrained(), and load that folder"
    )


def _mapping_names(adapter: Adapter) -> tuple[str, ...]:
    """Returns the names of a layer's attributes with an adapter's parameters, as in PEFT's layers."""
    peft = adapter.peft
    if adapter.source is not None and peft.mappings:
        return _mapping_names(adapter.source)
    if peft.single_mapping:
        return (peft.single_mapping,)
    own = dict.fromkeys(name.partition(".")[0] for name in adapter._parameters)
    return tuple(name for name in peft.mappings if name not in peft.modules) or tuple(own)
