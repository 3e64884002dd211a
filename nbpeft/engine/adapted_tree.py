"""Where a model carries adapters: read from its module tree, which other libraries change, too."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from nbpeft.engine.active_state import ActiveState
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.model_tree import Site, walk, without_wrappers
from nbpeft.engine.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.parameter_layer import AdaptedParameter, wrappers_of

Modules = dict[str, nn.Module | None]


@dataclass(frozen=True, eq=False)
class AdaptedTree:
    """The adapted layers and copied modules of a model as they hung in its module tree when it was read.

    Attributes:
        layers: path -> adapted layer, in model order.
        copies: path -> module with copies trained as a whole.
        parents: the submodules of each module on the way to one of these, as the module has them now.
        read: those that it had then.
    """

    layers: dict[str, AdaptedLayer] = field(default_factory=dict)
    copies: dict[str, ModulesToSaveWrapper] = field(default_factory=dict)
    parents: list[Modules] = field(default_factory=list)
    read: list[Modules] = field(default_factory=list)

    @property
    def is_current(self) -> bool:
        """Whether nobody has replaced, added or removed a module on the way to an adapter since."""
        return self.parents == self.read  # one comparison in C: this is asked in every command and call

    def names(self) -> set[str]:
        """Names of all adapters that are on a layer or have a copy of a module."""
        layers, copies = self.layers.values(), self.copies.values()
        return set().union(
            *(one.adapters._modules for one in layers), *(one.modules_to_save._modules for one in copies)
        )

    def wrappers(self) -> set[int]:
        """Ids of the adapted layers and of what holds the copies."""
        return {id(one) for one in (*self.layers.values(), *self.copies.values())}


def read_tree(model: nn.Module, active_state: ActiveState) -> AdaptedTree:
    """Reads where the module tree of a model has adapters.

    Args:
        model: the base model.
        active_state: of its manager; layers of another manager are not its own.
    """
    tree = AdaptedTree()
    parents: dict[int, Modules] = {}
    way: list[Site] = []
    known: set[int] = set()
    for site in walk(model):
        while way and not site.path.startswith(way[-1].path + "."):
            way.pop()
        way.append(site)
        wrapper = site.wrapper
        if wrapper is None or id(wrapper) in known or wrapper._shared_state() is not active_state:
            continue
        known.add(id(wrapper))
        for one in reversed(way):
            modules = one.parent._modules
            if id(modules) in parents:
                break
            parents[id(modules)] = modules
        path = without_wrappers(site.path)
        if isinstance(wrapper, ModulesToSaveWrapper):
            tree.copies[path] = wrapper
        elif isinstance(wrapper, AdaptedParameter):  # those for several parameters are inside each other
            tree.layers.update((layer.path_at(path), layer) for layer in reversed([*wrappers_of(wrapper)]))
        else:
            tree.layers[path] = wrapper
    tree.parents.extend(parents.values())
    tree.read.extend(dict(modules) for modules in tree.parents)
    return tree
