"""Where a model carries adapters: read from its module tree, which other libraries change, too."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.tree.model_tree import walk, without_wrappers
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter, wrappers_of

Modules = dict[str, nn.Module | None]
Wrapper = AdaptedLayer | ModulesToSaveWrapper


def _hangs(modules: Modules, name: str, child: nn.Module) -> bool:
    return modules.get(name) is child


@dataclass(frozen=True, eq=False)
class AdaptedTree:
    """The adapted layers and copied modules of a model as they hung in its module tree when it was read.

    Attributes:
        layers: path -> adapted layer, in model order.
        copies: path -> module with copies trained as a whole.
        others: layers and modules with copies that another manager made: they were copied or moved here.
        parents: the submodules of each module of the model, as the module has them now.
        read: those that it had then.
    """

    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    copies: dict[str, ModulesToSaveWrapper] = field(default_factory=dict)
    others: list[Wrapper] = field(default_factory=list)
    parents: list[Modules] = field(default_factory=list)
    read: list[Modules] = field(default_factory=list)

    @property
    def is_current(self) -> bool:
        """Whether nobody has replaced, added or removed a module since."""
        return self.parents == self.read  # one comparison in C: this is asked in every command and call

    def names(self) -> set[str]:
        """Names of all adapters that are on a layer or have a copy of a module."""
        layers, copies = self.layers.values(), self.copies.values()
        return set().union(
            *(one.adapters._modules for one in layers), *(one.modules_to_save._modules for one in copies)
        )

    def wrappers(self) -> dict[int, Wrapper]:
        """The adapted layers, and what holds the copies, by id."""
        found: list[Wrapper] = [*self.layers.values(), *self.copies.values()]
        return {id(one): one for one in found}

    def without(self, other: AdaptedTree) -> dict[int, Wrapper]:
        """The same, but for those that are in another tree, too."""
        known = other.wrappers()
        return {key: one for key, one in self.wrappers().items() if key not in known}

    def returns(self, wrappers: Container[int]) -> dict[int, Callable[[], bool]]:
        """Id of those that hung in a module -> whether it hangs there now."""
        return {
            id(child): partial(_hangs, modules, name, child)
            for modules, children in zip(self.parents, self.read, strict=True)
            for name, child in children.items()
            if child is not None and id(child) in wrappers
        }


def read_tree(model: nn.Module, active_state: ActiveState) -> AdaptedTree:
    """Reads where the module tree of a model has adapters.

    Args:
        model: the base model.
        active_state: of its manager.
    """
    tree = AdaptedTree()
    parents: dict[int, tuple[Modules, Modules]] = {}
    known: set[int] = set()
    for site in walk(model):
        parents[id(site.parent)] = site.parent._modules, site.siblings
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
        elif isinstance(wrapper, AdaptedParameter):  # those for several parameters are inside each other
            tree.layers.update((layer.path_at(path), layer) for layer in reversed([*wrappers_of(wrapper)]))
        else:
            tree.layers[path] = wrapper
    tree.parents.extend(modules for modules, _ in parents.values())
    tree.read.extend(siblings for _, siblings in parents.values())  # another thread may have changed them since
    return tree
