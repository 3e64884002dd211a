"""What methods, hosts and backends there are, and which one fits.

A file in ``methods/``, ``hosts/`` or ``backends/`` registers what it defines; nothing else
lists them. Packages outside nbpeft add theirs through the entry point group ``nbpeft.methods``:
each entry point names a module whose import registers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from nbpeft.engine.adapter import Adapter, AdapterConfig, Backend, Host
from nbpeft.errors import UnknownMethodError, did_you_mean

ENTRY_POINT_GROUP = "nbpeft.methods"


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        label: how a person calls it, e.g. ``DoRA``.
        peft_type: the ``peft_type`` in config files.
        config_class: class of its configs.
        adapter_class: class of its adapters.
        applies: whether a config of that class means this method (several may share a class).
    """

    label: str
    peft_type: str
    config_class: type[AdapterConfig]
    adapter_class: type[Adapter]
    applies: Callable[[Any], bool]


class _Ranked(Protocol):
    priority: int


AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])
HostClass = TypeVar("HostClass", bound=type[Any])

_methods: list[Method] = []
_hosts: list[Host] = []
_backends: list[Backend] = []
_entry_points_loaded = False


def register(
    config_class: type[AdapterConfig],
    *,
    peft_type: str,
    label: str,
    applies: Callable[[Any], bool] = lambda config: True,
) -> Callable[[AdapterClass], AdapterClass]:
    """Registers an adapter class as a method."""

    def decorate(cls: AdapterClass) -> AdapterClass:
        clash = next((m for m in _methods if m.label == label and m.adapter_class is not cls), None)
        if clash is not None and clash.adapter_class.__qualname__ != cls.__qualname__:
            raise UnknownMethodError(
                f"the method name {label!r} is taken by {clash.adapter_class.__module__}", label=label
            )
        if clash is not None:
            _methods.remove(clash)
        _methods.append(Method(label, peft_type, config_class, cls, applies))
        return cls

    return decorate


def family_of(adapter: Adapter) -> str | None:
    """The ``peft_type`` of the method that an adapter is made by; None if none is."""
    return next((method.peft_type for method in _methods if method.adapter_class is type(adapter)), None)


def register_host(cls: HostClass) -> HostClass:
    """Registers a host class; ``priority`` orders them, higher is asked first."""
    _insert(_hosts, cls())
    return cls


def register_backend(cls: HostClass) -> HostClass:
    """Registers a backend class; ``priority`` orders them, higher is asked first."""
    _insert(_backends, cls())
    return cls


def methods() -> tuple[Method, ...]:
    """All methods, those of other packages included."""
    _load_entry_points()
    return tuple(_methods)


def hosts() -> tuple[Host, ...]:
    """All hosts, in the order they are asked."""
    return tuple(_hosts)


def backends() -> tuple[Backend, ...]:
    """All backends, in the order they are asked."""
    return tuple(_backends)


def method_of(config: AdapterConfig) -> Method:
    """The method a config means.

    Raises:
        UnknownMethodError: no registered method takes this config.
    """
    for method in _methods if any(m.config_class is type(config) for m in _methods) else methods():
        if method.config_class is type(config) and method.applies(config):
            return method
    known, name = sorted({m.config_class.__name__ for m in _methods}), type(config).__name__
    whose = f" of {type(config).__module__.split('.')[0]}" if name in known else ""
    raise UnknownMethodError(
        f"{name}{whose} is not the config of a known method; known: {', '.join(known)}",
        config=type(config).__name__,
    )


def config_class_of(peft_type: str) -> type[AdapterConfig]:
    """The config class of a ``peft_type`` in a file.

    Raises:
        UnknownMethodError: no registered method has it.
    """
    known = {m.peft_type: m.config_class for m in reversed(methods())}
    if peft_type not in known:
        raise UnknownMethodError(
            f"peft_type {peft_type!r} is not a known method; known: {', '.join(sorted(known))}."
            + did_you_mean(peft_type, known),
            peft_type=peft_type,
        )
    return known[peft_type]


def resolve_host(module: nn.Module) -> Host | None:
    """The host a module is of, or None when its kind cannot be adapted."""
    return next((host for host in _hosts if host.matches(module)), None)


def resolve_backend(module: nn.Module) -> Backend | None:
    """The backend that reads a module's weight, or None."""
    return next((backend for backend in _backends if backend.matches(module)), None)


def host_named(name: str) -> Host:
    """The host of a name that ``resolve_host`` gave."""
    return next(host for host in _hosts if host.name == name)


def backend_named(name: str) -> Backend:
    """The backend of a name that ``resolve_backend`` gave."""
    return next(backend for backend in _backends if backend.name == name)


def _insert(ranked: list[Any], new: _Ranked) -> None:
    ranked[:] = [old for old in ranked if type(old).__qualname__ != type(new).__qualname__]
    ranked.append(new)
    ranked.sort(key=lambda item: -item.priority)


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()
