"""The adapted layers of a model, read from its module tree, which other libraries may change too."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.called_modules import outside
from nbpeft.engine.tree.model_tree import walk, without_wrappers
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter, wrappers_of
from nbpeft.engine.wrappers.wrapper import Wrapper

Modules = dict[str, nn.Module | None]


def _in_tree(wrapper: nn.Module) -> nn.Module:
    return wrapper.in_tree if isinstance(wrapper, AdaptedLayer) else wrapper


def _is_child(modules: Modules, name: str, module: nn.Module) -> bool:
    return modules.get(name) is module


@dataclass(frozen=True, eq=False)
class AdaptedTree:
    """A snapshot of the adapted layers and copied modules in the module tree of a model.

    Attributes:
        layers: path -> adapted layer, in model order.
        copies: path -> module with copies trained as a whole.
        others: wrappers from other managers that were copied or moved into this model.
        parents: ``_modules`` of each module, and the wrappers outside of the tree: the dictionaries themselves, with
            the present modules.
        read: copies of ``parents`` at the time when the tree was read.
    """

    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    copies: dict[str, ModulesToSaveWrapper] = field(default_factory=dict)
    others: list[Wrapper] = field(default_factory=list)
    parents: list[Modules] = field(default_factory=list)
    read: list[Modules] = field(default_factory=list)

    @property
    def is_current(self) -> bool:
        """Whether no module was replaced, added or removed since the tree was read."""
        return self.parents == self.read  # one comparison in C, because this runs in every command and call

    def names(self) -> set[str]:
        """Names of all adapters with a layer or a copy of a module."""
        layers, copies = self.layers.values(), self.copies.values()
        return set().union(
            *(layer.adapters._modules for layer in layers), *(module.modules_to_save._modules for module in copies)
        )

    def wrappers(self) -> dict[int, Wrapper]:
        """``id`` -> wrapper, of all adapted layers and modules with copies."""
        found: list[Wrapper] = [*self.layers.values(), *self.copies.values()]
        return {id(wrapper): wrapper for wrapper in found}

    def without(self, other: AdaptedTree) -> dict[int, Wrapper]:
        """``id`` -> wrapper, of those that are not in another tree."""
        known = other.wrappers()
        return {key: wrapper for key, wrapper in self.wrappers().items() if key not in known}

    def places(self, wrappers: Container[int]) -> Iterator[tuple[nn.Module, Modules, str]]:
        """Yields each of the wrappers, given by ``id``, with ``_modules`` of its parent and its name there."""
        by_place = {id(_in_tree(wrapper)): wrapper for key, wrapper in self.wrappers().items() if key in wrappers}
        for modules, children in zip(self.parents, self.read, strict=True):
            for name, child in children.items():
                if id(child) in by_place:
                    yield by_place[id(child)], modules, name

    def returns(self, wrappers: Container[int]) -> dict[int, Callable[[], bool]]:
        """``id`` -> function that checks whether a wrapper is at its old place again, for wrappers given by ``id``."""
        return {
            id(wrapper): partial(_is_child, modules, name, _in_tree(wrapper))
            for wrapper, modules, name in self.places(wrappers)
        }


def read_tree(model: nn.Module, active_state: ActiveState) -> AdaptedTree:
    """Reads the adapted layers and copied modules of a model.

    Args:
        model: the base model.
        active_state: state of its manager; wrappers with another state are from other managers.

    Returns:
        The snapshot.
    """
    tree = AdaptedTree()
    parents: dict[int, tuple[Modules, Modules]] = {id(model): (outside(model), dict(outside(model)))}
    known: set[int] = set()
    for site in walk(model):
        parents[id(site.parent._modules)] = site.parent._modules, site.siblings
        wrapper = site.wrapper
        if wrapper is None or id(wrapper) in known:
            continue
        known.add(id(wrapper))
        if wrapper._shared_state() is not active_state:
            tree.others.append(wrapper)
            continue
        path = without_wrappers(site.path)
        if isinstance(wrapper, ModulesToSaveWrapper):
            tree.copies[path] = wrapper
        elif isinstance(wrapper, AdaptedParameter):  # wrappers for several parameters of a module are nested
            tree.layers.update((layer.path_at(path), layer) for layer in reversed([*wrappers_of(wrapper)]))
        else:
            tree.layers[path] = wrapper
    tree.parents.extend(modules for modules, _ in parents.values())
    tree.read.extend(siblings for _, siblings in parents.values())  # another thread may have changed them since
    return tree
