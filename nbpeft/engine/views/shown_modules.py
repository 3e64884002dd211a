"""Which modules a layer shows for its adapters, and under which of the declared names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.capabilities import inner_adapters_of
from nbpeft.engine.contract.registry import Method
from nbpeft.engine.kernels.live_parameters import Slot
from nbpeft.engine.views.part_modules import (
    AdapterDict,
    BufferMapping,
    Container,
    ModuleListing,
    ParameterListing,
    ParameterMapping,
    ParameterModule,
    Remainder,
    ShownParts,
    new_leaf,
    own_module,
    unnamed_parts,
)
from nbpeft.engine.views.part_names import shared_here, shown_name


def show_adapters(
    shown: dict[str, Any],
    before: Mapping[str, Any],
    live: Mapping[str, Any],
    base: BaseLayer,
    *,
    parts_apart: bool = False,
) -> dict[str, Any]:
    """Updates the modules that show a layer's adapters; existing modules of present adapters are kept.

    Args:
        shown: the modules by PEFT's name, changed in place.
        before: the adapters that are shown: adapter name -> adapter.
        live: adapter name -> adapter; another thread may change it during this call.
        base: the layer.
        parts_apart: whether a handle lists the modules that adapters have on the model.

    Returns:
        The adapters that are shown now.
    """
    present = dict(live)  # a copy, because iterating over a model takes no lock
    if _show_changes(shown, before, present, base, parts_apart=parts_apart):
        return present
    adapters = {
        inner: one for adapter in present.values() for inner, one in inner_adapters_of(adapter).items()
    } | present
    modules: dict[str, dict[str, nn.Module]] = {}
    slots: dict[str, dict[str, Slot]] = {}
    parameters: dict[tuple[str, str], dict[str, Slot]] = {}
    shared = shared_here(present)
    holders = [*adapters.items(), *shared.items()]
    buffers = {
        own: {name: one for name, one in holders if own in one._buffers}
        for _, holder in holders
        for own in list(holder._buffers)
    }
    for name, state in shared.items():
        for own in list(state._parameters):
            parameters.setdefault(("", own), {})[name] = (state, own)
        for own, module in state.named_children():
            modules.setdefault(own, {})[name] = module
    for name, adapter in adapters.items():
        for own, make in _parts_of(adapter, base, parts_apart=parts_apart):
            modules.setdefault(own, {})[name] = _kept(shown, own, name, adapter) or make()
            slots.setdefault(own, {})[name] = (adapter, own)
        for own in _without_module(adapter):
            parameters.setdefault((adapter.peft.container, own), {})[name] = (adapter, own)
    used = {"base_layer", *modules, *buffers, *(container or own for container, own in parameters)}
    for unused in shown.keys() - used:
        _empty(shown.pop(unused))
    for shown_as, leaves in modules.items():
        _container(shown, shown_as, ShownParts)._modules.keep(leaves, slots.get(shown_as, {}), base)
        shown[shown_as].show(parameters.pop(("", shown_as), {}))
    for (container, own), own_slots in parameters.items():
        place = shown.setdefault(container, Container(live))._modules if container else shown
        _container(place, own, ParameterMapping).show(own_slots)
    for own, having in buffers.items():
        _container(shown, own, BufferMapping).show(having, own)
    _sort(shown, adapters, shared)
    return present


def _show_changes(
    shown: dict[str, Any],
    before: Mapping[str, Any],
    present: Mapping[str, Any],
    base: BaseLayer,
    *,
    parts_apart: bool,
) -> bool:
    """Shows new adapters and hides deleted ones without touching the others.

    Returns:
        False, and nothing is changed, unless these adapters have the parts of the first one that stays, and the new
        ones come last. Otherwise the order of the shown modules, or which of them there are, may change.
    """
    gone = {name: adapter for name, adapter in before.items() if present.get(name) is not adapter}
    new = {name: adapter for name, adapter in present.items() if before.get(name) is not adapter}
    kept = [name for name in before if name not in gone]
    layout = _layout(before[kept[0]]) if kept else None
    alike = layout is not None and all(_layout(adapter) == layout for adapter in (*gone.values(), *new.values()))
    mixed = any(isinstance(module, ShownParts) and module._parameters for module in shown.values())
    if not alike or mixed or [*kept, *new] != [*present]:
        return False
    try:
        places = [place for name in new for place in _places(shown, name, new[name], base, parts_apart=parts_apart)]
    except KeyError:  # the adapter that stays was shown elsewhere: an adapter on another layer requests it since then
        return False
    for mapping in _mappings(shown):
        for name in gone:
            mapping.leave(name)
    for mapping, name, slot, module in places:
        mapping.put(name, slot, module)
    return True


def _places(
    shown: dict[str, Any], name: str, adapter: Adapter, base: BaseLayer, *, parts_apart: bool
) -> Iterator[tuple[Any, str, Slot, nn.Module | None]]:
    """Yields where each part of an adapter is shown: the mapping, its name there, the part and its module, if any.

    Raises:
        KeyError: there is no such mapping.
    """
    container = shown[adapter.peft.container]._modules if adapter.peft.container else shown
    for own, make in _parts_of(adapter, base, parts_apart=parts_apart):
        yield shown[own]._modules, name, (adapter, own), _kept(shown, own, name, adapter) or make()
    for own in _without_module(adapter):
        yield container[own], name, (adapter, own), None
    for own in adapter._buffers:
        yield shown[own], name, (adapter, own), None


def _layout(adapter: Adapter) -> tuple[Any, ...] | None:
    """A key for the modules that show an adapter; None if there are some of inner adapters or of a shared state."""
    if inner_adapters_of(adapter) or "shared" in adapter._modules:
        return None
    return type(adapter), adapter.peft, [*adapter._parameters], [*adapter._buffers], [*adapter._modules]


def _mappings(shown: Mapping[str, Any]) -> Iterator[Any]:
    """The mappings by adapter name among the shown modules."""
    for module in shown.values():
        if isinstance(module, Container):
            yield from _mappings(module._modules)
        elif isinstance(module, ShownParts):
            yield module._modules
        elif isinstance(module, ParameterMapping | BufferMapping):
            yield module


def _without_module(adapter: Adapter) -> Iterator[str]:
    """The parameters of an adapter that no module shows, but a mapping by adapter name."""
    for own in list(adapter._parameters):
        has_module = own in adapter.peft.grouped or own.partition(".")[0] in adapter.peft.lists
        if not has_module and own.removesuffix("_bias") not in adapter.peft.wrapped:
            yield own


def _sort(shown: dict[str, Any], adapters: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    """Sorts the modules by the adapters' order of parameters, as in PEFT: optimizer state is keyed by this order."""
    own = [shown_name(adapter, key, "") for adapter in adapters.values() for key in list(adapter._parameters)]
    own += [key for state in shared.values() for key in (*state._parameters, *state._modules)]
    places = {name: place for place, name in enumerate(dict.fromkeys(name.partition(".")[0] for name in own))}
    for name in sorted(places.keys() & shown.keys(), key=lambda name: places[name]):
        shown[name] = shown.pop(name)


def _parts_of(adapter: Adapter, base: BaseLayer, *, parts_apart: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the names of the modules that show parts of an adapter, each with a function that creates it."""
    for own in adapter.peft.modules:
        yield own, partial(own_module, adapter, own, base)
    for own in adapter.peft.lists:
        wraps = own in adapter.peft.wrapped
        yield own, partial(ModuleListing, adapter, own, base) if wraps else partial(ParameterListing, adapter, own)
    groups: dict[str, dict[str, Slot]] = {}
    for own in [own for own in adapter._parameters if own in adapter.peft.grouped]:
        group, _, part = adapter.peft.grouped[own].partition(".")
        groups.setdefault(group, {})[part] = (adapter, own)
    for group, slots in groups.items():
        yield group, partial(ParameterMapping, slots)
    for own in list(adapter._parameters):
        if own in adapter.peft.wrapped:
            yield own, partial(new_leaf, adapter, own, base)
    if unnamed_parts(adapter) and not (parts_apart and adapter.peft.on_model):
        yield adapter.peft.shown_as, partial(Remainder, adapter)


def _container(place: dict[str, Any], name: str, kind: type[ShownParts | ParameterMapping | BufferMapping]) -> Any:
    """The mapping of a class under a name; replaces a mapping of another class."""
    if not isinstance(place.get(name), kind):
        if name in place:
            _empty(place[name])
        place[name] = ParameterMapping({}) if kind is ParameterMapping else kind()  # type: ignore[call-arg]
    return place[name]


def _empty(container: Any) -> None:
    """Empties a mapping that is no longer shown, but to which other code may still have a reference."""
    if isinstance(container, AdapterDict | ParameterMapping):
        container.show({})
    if isinstance(container, BufferMapping):
        container.show({}, "")
    for inner in container._modules.values() if isinstance(container, Container) else ():
        _empty(inner)
    if isinstance(container, ShownParts):
        parts: Any = container._modules
        parts.keep({}, {})
    container._modules.clear()


def _kept(shown: Mapping[str, Any], shown_as: str, name: str, adapter: Adapter) -> nn.Module | None:
    """The existing module that shows a part of an adapter."""
    leaves: Any = shown[shown_as]._modules if isinstance(shown.get(shown_as), ShownParts) else None
    return None if leaves is None else leaves.of(name, adapter)


def shown_under(shown: Mapping[str, Any], name: str) -> nn.Module | None:
    """The module with a name, on the layer itself or in a container module; None if there is none."""
    inside = (container._modules for container in shown.values() if isinstance(container, Container))
    return next((found for place in (shown, *inside) if (found := place.get(name)) is not None), None)


def unfilled(method: Method, name: str, *, with_settings: bool) -> Any:
    """The value of an attribute of PEFT's layers of a method, if none of the layer's adapters has it.

    Args:
        method: the method.
        name: name of a mapping of parameters, modules or settings by adapter name.
        with_settings: include settings, for a layer without adapters; adapters always have them.

    Returns:
        An empty mapping; None for other names.
    """
    parameters, settings = method.peft.parameters.split(), method.peft.others.split()
    own = method.adapter_class
    if name not in parameters and not with_settings:
        return None
    groups = (place.partition(".")[0] for place in own.peft.grouped.values())
    if name in (*own.peft.wrapped, *own.peft.modules, *groups):
        return AdapterDict()
    return ParameterMapping({}) if name in parameters else {} if name in (*settings, *own.peft.attributes) else None


def use_shown(adapters: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Assigns to replicas of adapters, made by nn.DataParallel, the tensors of the replicas of these modules.

    Args:
        adapters: adapter name -> replica that has no tensors yet.
        shown: the modules by PEFT's name.
    """
    for shown_as, container in shown.items():
        if isinstance(container, ParameterMapping):
            for name in container._keys:
                adapters[name].__dict__[shown_as] = container.__dict__[name]
        elif isinstance(container, BufferMapping):
            for name, value in container._buffers.items():
                adapters[name]._buffers = {**adapters[name]._buffers, shown_as: value}
        elif isinstance(container, Container):
            use_shown(adapters, container._modules)
        elif isinstance(container, AdapterDict):
            for name, leaf in container._modules.items():
                _use_leaf(adapters[name], shown_as, leaf)


def _use_leaf(adapter: Any, shown_as: str, leaf: nn.Module) -> None:
    """Assigns the tensors of the replica of a module that shows a part of an adapter; see ``use_shown``."""
    own, held = adapter.__dict__, leaf.__dict__
    if isinstance(leaf, Remainder):
        own["_modules"] = leaf._modules
    elif isinstance(leaf, ParameterModule):
        names = {adapter.peft.names_in_modules.get(shown_as, "weight"): shown_as, "bias": f"{shown_as}_bias"}
        own.update({name: held[key] for key, name in names.items() if key in held})
    elif isinstance(leaf, ParameterListing):
        own.update({name: held[key] for key, name in leaf.owned.items()})
    elif isinstance(leaf, ModuleListing):
        own.update({f"{shown_as}.{key}": one.__dict__["weight"] for key, one in leaf._modules.items()})
    elif isinstance(leaf, ParameterMapping):
        places = {f"{shown_as}.{key}": key for key in leaf._keys}
        own.update({name: held[places[place]] for name, place in adapter.peft.grouped.items() if place in places})
