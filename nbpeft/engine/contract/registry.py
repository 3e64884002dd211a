"""The registry of methods, layer kinds and weight backends, and the lookups in it.

Each file in ``methods/``, ``layer_kinds/`` or ``backends/`` registers what it defines; there is no other
list of them. Packages outside nbpeft add methods through the entry point group ``nbpeft.methods``:
each entry point names a module, which registers its methods when it is imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar

from torch import nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig, PeftType
from nbpeft.engine.contract.base import Backend, Composite, LayerKind
from nbpeft.engine.contract.combination import Combine
from nbpeft.engine.contract.method_records import CallInputs, FileFormat, Listing, OwnKinds, SharedTensors
from nbpeft.engine.contract.method_records import Companion as Companion
from nbpeft.engine.contract.method_records import Part as Part
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registration import (
    check_classes,
    check_config_class,
    check_fields,
    check_peft_type,
    check_values,
)
from nbpeft.errors import ConfigError, UnknownMethodError, did_you_mean, in_one_line, shortened

ENTRY_POINT_GROUP = "nbpeft.methods"
"""Also the module with the names that a package needs to define a method."""

Targets = Collection[str] | str | None


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        label: display name, such as ``DoRA``.
        peft_type: the ``peft_type`` in config files.
        config_class: class of its configs.
        adapter_class: class of its adapters.
        applies: config -> whether it belongs to this method; for config classes that several methods share.
        default_targets: model type -> default targets: names, a pattern or "all-linear"; None if unknown.
        sample_configs: name -> fields of a config, without targets; the method's tests run with each of them.
        draws_in_training: whether its adapters use random numbers in training mode, in addition to dropout.
        combine: combines its adapters; methods that can be combined with each other share one object.
        listing: how lists and panels present it.
        shares: tensors that its layers share.
        calls: what it reads from calls of the model.
        files: how its files differ from its parameters.
        kinds: which kinds of layers it supports, if that differs from the default.
    """

    label: str
    peft_type: str
    config_class: type[AdapterConfig]
    adapter_class: type[Adapter]
    applies: Callable[[Any], bool] = lambda config: True
    default_targets: Callable[[str | None], Targets] = lambda model_type: None
    sample_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draws_in_training: bool = False
    combine: Combine | None = None
    listing: Listing = field(default_factory=Listing)
    shares: SharedTensors = field(default_factory=SharedTensors)
    calls: CallInputs = field(default_factory=CallInputs)
    files: FileFormat = field(default_factory=FileFormat)
    kinds: OwnKinds = field(default_factory=OwnKinds)

    @property
    def prefix(self) -> str:
        """The start of its parameters' keys in PEFT's files."""
        return self.files.prefix or f"{self.peft_type.lower()}_"

    @property
    def peft(self) -> PeftNames:
        """PEFT's names for the parts of its adapters."""
        return self.adapter_class.peft

    @property
    def transforms_calls(self) -> bool:
        """Whether its adapters change calls of the whole model instead of layers."""
        return issubclass(self.adapter_class, ModelAdapter)

    def title(self, config: AdapterConfig) -> str:
        """Its display name for one config: the variant if there is one, else the label."""
        return self.listing.variant(config) or self.label


_RECORDS: dict[str, type[Any]] = {
    "listing": Listing,
    "shares": SharedTensors,
    "calls": CallInputs,
    "files": FileFormat,
    "kinds": OwnKinds,
}
_FIELDS = tuple(field.name for field in dataclasses.fields(Method))[4:]


class _Ranked(Protocol):
    priority: int


AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])
KindClass = TypeVar("KindClass", bound=type[Any])
Matching = TypeVar("Matching", Backend, LayerKind, Any)

_methods: list[Method] = []
_layer_kinds: list[LayerKind] = []
_composites: list[Any] = []
_backends: list[Backend] = []
_entry_points_loaded = False
_entry_points_loading = False
_entry_points_lock = threading.RLock()


def register(
    config_class: type[AdapterConfig], *, label: str, peft_type: str = "", **fields: Any
) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator that registers an adapter class as a method.

    Args:
        config_class: class of its configs.
        label: its display name.
        peft_type: the ``peft_type`` in config files; by default the ``method_type`` of the config class.
        **fields: the other attributes of ``Method``.

    Returns:
        The decorator.

    Raises:
        UnknownMethodError: another class has this label.
        ConfigError: ``Method`` has no such attribute, a value or the class is invalid, or an earlier method with this
            config class leaves it no config.
    """
    type_in_files = peft_type or getattr(config_class, "method_type", "")
    check_fields(label, fields, _FIELDS)
    check_values(label, fields, _RECORDS)

    def decorate(cls: AdapterClass) -> AdapterClass:
        method = Method(label, type_in_files, config_class, cls, **fields)
        check_classes(label, cls)
        check_peft_type(
            label, type_in_files, config_class, {m.peft_type: m.config_class for m in _methods if m.label != label}
        )
        check_config_class(label, config_class, method.sample_configs)
        clash = next((m for m in _methods if m.label == label), None)
        if clash is not None and clash.adapter_class.__qualname__ != cls.__qualname__:
            raise UnknownMethodError(
                f"the method name {label!r} is taken by {clash.adapter_class.__module__}", label=label
            )
        changed = [method if m is clash else m for m in _methods] if clash is not None else [*_methods, method]
        _check_reachable([m for m in changed if m.config_class is config_class])
        PeftType.add(type_in_files)
        _methods[:] = changed
        return cls

    return decorate


def _check_reachable(sharing: Sequence[Method]) -> None:
    """Refuses a method that no config selects, because an earlier one with this config class takes all configs."""
    for number, method in enumerate(sharing[:-1]):
        if method.applies is Method.applies:
            hidden = sharing[number + 1]
            raise ConfigError(
                f"{hidden.label}: every {method.config_class.__name__} is one of {method.label}, so this method is "
                f"never reached: give it a config class of its own, or {method.label} an applies=…",
                field="applies",
            )


def register_layer_kind(cls: KindClass) -> KindClass:
    """Class decorator that registers a kind of layer; kinds of higher ``priority`` are tried first."""
    _insert(_layer_kinds, cls())
    _composites[:] = [kind for kind in _layer_kinds if isinstance(kind, Composite)]
    return cls


def register_backend(cls: KindClass) -> KindClass:
    """Class decorator that registers a backend; backends of higher ``priority`` are tried first."""
    _insert(_backends, cls())
    return cls


def methods() -> tuple[Method, ...]:
    """All methods, including those of other packages."""
    _load_entry_points()
    return tuple(_methods)


def layer_kinds() -> tuple[LayerKind, ...]:
    """All kinds of layers, in the order in which they are tried."""
    return tuple(_layer_kinds)


def backends() -> tuple[Backend, ...]:
    """All backends, in the order in which they are tried."""
    return tuple(_backends)


def method_of(config: AdapterConfig) -> Method:
    """The method of a config.

    Raises:
        UnknownMethodError: no registered method has configs of this class.
    """
    own = type(config)
    for method in [m for m in _methods if m.config_class is own] or methods():
        if method.config_class is own and method.applies(config):
            return method
    for parent in type(config).__mro__[1:]:  # a class of a script with further fields
        for method in _methods:
            if method.config_class is parent and method.peft_type == config.peft_type and method.applies(config):
                return method
    known, name = sorted({m.config_class.__name__ for m in _methods}), type(config).__name__
    whose = f" of {type(config).__module__.split('.')[0]}" if name in known else ""
    raise UnknownMethodError(
        f"{name}{whose} is not the config of a known method; known: {', '.join(known)}",
        config=type(config).__name__,
    )


def method_of_adapter(adapter: Adapter) -> Method | None:
    """The method of an adapter, which is that of the nearest registered class among its bases; None without one."""
    return method_of_class(type(adapter))


def method_of_class(adapter_class: type[Adapter]) -> Method | None:
    """The method of a class of adapters; None without one."""
    for cls in adapter_class.__mro__:
        for method in _methods:
            if cls in (method.adapter_class, *method.kinds.classes.values()):
                return method
    return None


def methods_of_type(peft_type: str) -> tuple[Method, ...]:
    """The methods that share a ``peft_type`` in files."""
    return tuple(method for method in methods() if method.peft_type == peft_type)


def transforms_calls(peft_type: str) -> bool:
    """Whether adapters with a ``peft_type`` change calls of the whole model, so that their files name no layers."""
    return any(method.transforms_calls for method in methods_of_type(peft_type))


def companions() -> tuple[Method, ...]:
    """The methods whose adapters can be requested by configs of other methods."""
    return tuple(method for method in methods() if method.shares.companion is not None)


def file_keys(peft_type: str) -> dict[str, str]:
    """Parameter name -> part of its key after the module path in PEFT's files; a missing name is its own key.

    Args:
        peft_type: ``peft_type`` of the config in the same folder.
    """
    keys: dict[str, str] = {}
    for method in methods():
        if method.shares.companion is not None:
            keys.update(method.shares.companion.file_keys)
    for method in methods_of_type(peft_type):
        if method.shares.companion is not None:
            keys = {key: value for key, value in keys.items() if key not in method.shares.companion.file_keys}
        keys.update(method.files.keys)
    return keys


def prefixes(peft_type: str) -> tuple[str, ...]:
    """The possible starts of parameter keys in a file whose config has this ``peft_type``."""
    starts = {method.prefix for method in (*methods_of_type(peft_type), *companions())}
    return tuple(sorted(starts))


def config_class_of(peft_type: str) -> type[AdapterConfig]:
    """The config class of a ``peft_type`` in a file.

    Raises:
        UnknownMethodError: no registered method has this ``peft_type``.
    """
    known = {m.peft_type: m.config_class for m in reversed(methods())}
    if peft_type not in known:
        raise UnknownMethodError(
            f"peft_type {peft_type!r} is not a known method; known: {', '.join(sorted(known))}."
            + did_you_mean(peft_type, known),
            peft_type=peft_type,
        )
    return known[peft_type]


def resolve_layer_kind(module: nn.Module, method: Method | None = None) -> LayerKind | None:
    """The kind of a layer.

    Args:
        module: the frozen layer.
        method: a method; its own kinds (``OwnKinds.only``), if any, are tried instead of all kinds.

    Returns:
        The kind; None if the layer cannot be adapted.
    """
    kinds = _layer_kinds if method is None or not method.kinds.only else method.kinds.only
    return _first_match(kinds, module)


def composite_kind(module: nn.Module) -> Any:
    """The ``Composite`` kind of a module that computes with several weights itself; None for any other module."""
    return _first_match(_composites, module)


def resolve_backend(module: nn.Module) -> Backend | None:
    """The backend that can read a module's weight, or None."""
    return _first_match(_backends, module)


def _first_match(ranked: Sequence[Matching], module: nn.Module) -> Matching | None:
    for candidate in ranked:  # runs for every module of a model; a generator expression would take twice as long
        if candidate.matches(module):
            return candidate
    return None


def layer_kind_named(name: str) -> LayerKind:
    """The kind with a name, as in ``LayerKind.name``."""
    own = (kind for method in _methods for kind in method.kinds.only)
    return next(kind for kind in chain(_layer_kinds, own) if kind.name == name)


def backend_named(name: str) -> Backend:
    """The backend with a name, as in ``Backend.name``."""
    return next(backend for backend in _backends if backend.name == name)


def _registered(cls: type[Any]) -> Any:
    """Returns the instance of a kind of layer or of a backend that is registered."""
    return next((one for one in (*_layer_kinds, *_backends) if type(one) is cls), None) or cls()


def _insert(ranked: list[Any], new: _Ranked) -> None:
    # Copied and unpickled layers have the registered instance, which is compared by identity.
    type(new).__reduce__ = lambda self: (_registered, (type(self),))  # type: ignore[method-assign]
    ranked[:] = [old for old in ranked if type(old).__qualname__ != type(new).__qualname__]
    ranked.append(new)
    ranked.sort(key=lambda item: -item.priority)


def _load_entry_points() -> None:
    """Imports the modules of other packages that register methods, once; a failing one is skipped with a warning."""
    global _entry_points_loaded, _entry_points_loading
    # The packages import their names from ``nbpeft.methods``, and would fail while that is being imported itself.
    names = sys.modules.get(ENTRY_POINT_GROUP)
    if _entry_points_loaded or (names is not None and not hasattr(names, "MethodConfig")):
        return
    failures = []
    with DeferredInterrupts(), _entry_points_lock:
        # The lock is reentrant: a package may use the registry while it is being imported here.
        if _entry_points_loaded or _entry_points_loading:
            return
        _entry_points_loading = True
        try:
            for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                try:
                    entry_point.load()
                except Exception as error:
                    failures.append((entry_point, error))
            _entry_points_loaded = True
        finally:
            _entry_points_loading = False
    for entry_point, failure in failures:
        package = entry_point.value if entry_point.dist is None else entry_point.dist.name
        warnings.warn(
            f"the method {entry_point.name!r} of the package {package} cannot be loaded and is left out: "
            f"{type(failure).__name__}: {shortened(in_one_line(failure), 200)}",
            stacklevel=3,
        )
