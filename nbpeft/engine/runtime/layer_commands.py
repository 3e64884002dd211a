"""Commands on a single layer, as PEFT's layers have them; those of the manager are for the whole model."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from nbpeft.engine.calls.model_calls import take_hooks
from nbpeft.engine.changes.active_state import ActiveState, LayerState
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig, source_of
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import companions, method_of, resolve_layer_kind
from nbpeft.engine.injection.build import build, commit, hook_in
from nbpeft.engine.runtime.adapter_tensors import is_half
from nbpeft.engine.runtime.merging import check_merge
from nbpeft.engine.tree.adapted_tree import AdaptedTree
from nbpeft.engine.tree.tied_weights import check_single, layers_to_untie
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import AdapterError, BaseMismatchError, ConfigError, MergeError, StaleModelError


def _at(config: AdapterConfig, path: str) -> AdapterConfig:
    """A config for one layer alone."""
    fields = {"target_modules": re.escape(path), "bias": "none"}
    companion_fields = [method.shares.companion.field for method in companions() if method.shares.companion is not None]
    cleared = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", *companion_fields)
    return config.copy(**fields, **dict.fromkeys(cleared))


@dataclass(frozen=True)
class Departed:
    """An adapter whose layers were all taken out of the model by other code.

    Attributes:
        config: its config.
        place: its index among the adapters.
        scale: factor on its delta, where one was set.
        frozen: whether it was frozen.
        unsaved: whether it was trained since it was added, loaded or saved.
        chosen: which adapters were selected before it left.
        chosen_then: which adapters were selected after it left.
    """

    config: AdapterConfig
    place: int
    scale: float | None
    frozen: bool
    unsaved: bool
    chosen: tuple[str, ...]
    chosen_then: tuple[str, ...] = ()

    @classmethod
    def of(cls, manager: Any, name: str, place: int) -> Departed:
        """Records the state of an adapter that is still on the model."""
        state = name in manager.frozen, name in manager.unsaved, manager._selected
        return cls(manager._configs[name], place, manager._scales.get(name), *state)

    def restore(self, manager: Any, name: str) -> None:
        """Registers it with the manager again."""
        manager._configs.place(name, self.config, self.place)
        if self.scale is not None:
            manager._scales[name] = self.scale
        if self.frozen:
            manager.frozen.add(name)
        if self.unsaved:
            manager.unsaved.add(name)


class LayerCommands:
    """Commands that the layers of a model pass on to its manager.

    Args:
        manager: the model's manager; referenced weakly, so that a layer does not keep a model alive.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = weakref.ref(manager)

    @property
    def manager(self) -> Any:
        """The manager.

        Raises:
            StaleModelError: it no longer exists.
        """
        manager = self._manager()
        if manager is None:
            raise StaleModelError("the layer belongs to a model that is gone")
        return manager

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the model's active adapters; other libraries read them from each layer in turn."""
        names: tuple[str, ...] = self.manager._chosen
        return names

    def brought_by(self, wrapper: Wrapper) -> dict[str, AdapterConfig] | None:
        """Configs of the adapters on a layer that is in this model now but was made for another one.

        Args:
            wrapper: the layer, or module with copies; a copy, or one that was moved.

        Returns:
            Adapter name -> config. None while the layer is still part of the other model as well, if an adapter with
            another config has one of the names here, or if a config is unknown.
        """
        former = wrapper._shared_state().layer_commands
        own: dict[str, AdapterConfig] = self.manager._configs
        if former is None:  # a copy: its adapters have the names of the original's
            known = own
        else:
            manager = former._manager()
            if manager is None or id(wrapper) in manager._known_tree().wrappers():
                return None
            known = {name: departed.config for name, departed in manager.moved_away.items()} | manager._configs
        if not all(name in known and own.get(name, known[name]) is known[name] for name in wrapper._named()):
            return None
        return {name: known[name] for name in wrapper._named()}

    def take_over(self, tree: AdaptedTree, change: Transaction) -> bool:
        """Takes over the layers of a tree that were copied or moved into the model; returns whether there are any."""
        brought = [(wrapper, self.brought_by(wrapper)) for wrapper in tree.others]
        for wrapper, configs in brought:
            if configs is not None:
                change.keep_attributes(wrapper, "active_state")
                wrapper.__dict__["active_state"] = self.manager.active_state
                self.manager._configs.update(configs)
        return any(configs is not None for _, configs in brought)

    def update(self, before: AdaptedTree | None, tree: AdaptedTree, change: Transaction) -> bool:
        """Follows what somebody did to the module tree by hand.

        Args:
            before: the tree as it was last read; None for the tree of a copy, which has not been read yet.
            tree: the tree as it is now.
            change: records what is written.

        Returns:
            Whether layers were taken out, put back, copied or moved here.
        """
        manager = self.manager
        if self.take_over(tree, change):
            tree = manager._read_tree()
        if before is None:
            return False
        if self._move_prompts(before, tree, change):
            tree = manager._read_tree()
        gone, come = before.without(tree), tree.without(before)
        self._let_go(gone, before, change)
        if gone:
            take_hooks(called_modules(manager.model), gone, change)
        self._take_back(come.values(), change)
        return bool(gone or come)

    def _move_prompts(self, before: AdaptedTree, tree: AdaptedTree, change: Transaction) -> bool:
        """Moves learned prompts to the embedding that replaced theirs; see ``update`` for the arguments.

        ``set_input_embeddings`` replaces it. Prompts do not depend on its values, so they are not lost with it.

        Returns:
            Whether any were moved.
        """
        moved: dict[nn.Module, nn.Module] = {}
        for wrapper, modules, name in before.places(before.without(tree)):
            new = modules.get(name)
            if new is None or not isinstance(wrapper, AdaptedLayer):
                continue
            kind, old = resolve_layer_kind(new), wrapper.base_layer
            if wrapper not in moved:
                only_prompts = all(isinstance(one, ModelAdapter) for one in wrapper.adapters._modules.values())
                if new is old or not only_prompts:  # with its own layer in its place, the wrapper was taken out
                    continue
                if kind is not wrapper.kind or kind.features(new)[1] != kind.features(old)[1]:
                    continue
                wrapper.replace_base_layer(new, change)
                moved[wrapper] = new
            if moved[wrapper] is new:  # the same module can be in several places
                change.set_item(modules, name, wrapper)
        return bool(moved)

    def see_off(self, names: Sequence[str], change: Transaction) -> None:
        """Unregisters adapters that are no longer in the module tree, and records them: they may come back."""
        manager = self.manager
        order = [*manager._configs]
        left = {name: Departed.of(manager, name, order.index(name)) for name in names}
        manager._forget(names, change)
        manager.moved_away.update(
            {name: replace(departed, chosen_then=manager._selected) for name, departed in left.items()}
        )

    def _take_back(self, wrappers: Iterable[Wrapper], change: Transaction) -> None:
        """Connects layers that are in the model now to its manager, including layers that were taken out before."""
        manager, back = self.manager, dict[str, Departed]()
        for wrapper in wrappers:
            change.keep_attributes(wrapper, "active_state")
            wrapper.__dict__["active_state"] = manager.active_state
            known = manager.moved_away.keys() & wrapper._named().keys() - manager._configs.keys()
            back.update({name: manager.moved_away[name] for name in known})
            if isinstance(wrapper, AdaptedLayer):
                hook_in(manager.model, wrapper, wrapper.adapters._modules.values(), change)
        for name, departed in sorted(back.items(), key=lambda item: item[1].place):
            departed.restore(manager, name)
        merged = {name for wrapper in wrappers if isinstance(wrapper, AdaptedLayer) for name in wrapper.merged_names}
        manager._merged = tuple(name for name in manager._configs if name in {*manager._merged, *merged})
        choice = next((departed for departed in back.values() if departed.chosen_then == manager._selected), None)
        if choice is not None:  # the selection has not changed since
            manager._selected = tuple(name for name in choice.chosen if name in manager._configs)

    def _let_go(self, wrappers: Mapping[int, Wrapper], before: AdaptedTree, change: Transaction) -> None:
        """Gives layers that were taken out of the model a state of their own, so that they compute as before."""
        shared: ActiveState = self.manager.active_state
        are_back = before.returns(wrappers)
        chosen, enabled = self.manager._selected, self.manager._enabled
        for key, wrapper in wrappers.items():
            if wrapper.active_state is shared:
                change.keep_attributes(wrapper, "active_state")
                state = LayerState(shared, chosen, enabled=enabled, active=shared.live, is_back=are_back.get(key))
                wrapper.__dict__["active_state"] = state

    def merge(self, layer: AdaptedLayer, names: Sequence[str], *, safe: bool) -> None:
        """Merges adapters into one layer, in addition to those already merged there.

        Args:
            layer: the layer.
            names: adapters to merge; those that the layer lacks are ignored.
            safe: refuse weights that would not be finite.

        Raises:
            MergeError: the weight cannot be merged into, would not be finite (``safe``), or is tied to other layers
                into which adapters were merged at the same time.
        """
        manager = self.manager
        together = [name for name in dict.fromkeys((*layer.merged_names, *names)) if name in layer.adapters]
        with manager.transaction() as change:
            manager._refuse_in_scopes("merging")
            check_single(layer, manager.layers)
            manager._keep_choice(change)
            change.keep_attributes(layer, "merged_names", "_frozen")
            if layer.merged_names:
                layer.restore_base(change)
            check_merge({"the layer": layer}, together, manager.scale, safe=safe)
            apart = bool(layers_to_untie(manager.model, {"the layer": layer}, together))
            scales = [manager.scale(name) for name in together]
            layer.merge_into_base(together, scales, change, keep_frozen=True, apart=apart)
            manager._merged = tuple(dict.fromkeys((*manager.merged, *together)))
            manager._publish_active()

    def unmerge(self, layer: AdaptedLayer) -> None:
        """Restores the frozen weight of one layer, bit for bit.

        Raises:
            MergeError: it is tied to other layers into which adapters were merged at the same time.
        """
        manager = self.manager
        with manager.transaction() as change:
            check_single(layer, manager.layers)
            manager._keep_choice(change)
            layer.restore_base(change)
            left = {name for other in manager.layers.values() for name in other.merged_names}
            manager._merged = tuple(name for name in manager.merged if name in left)
            manager._publish_active()

    def set_base_weight(self, layer: AdaptedLayer, weight: Tensor) -> None:
        """Writes the frozen weight of one layer; in its dtype, or quantized with the layer's settings.

        Args:
            layer: the layer.
            weight: the new values, shaped like the layer's base weight.

        Raises:
            MergeError: adapters are merged, or the backend cannot write its weights.
            BaseMismatchError: the weight has another shape.
        """
        manager, backend, module = self.manager, layer.backend, layer.weight_module
        with manager.transaction() as change:
            manager.refuse_merged("writing base weights")
            if not backend.can_merge:
                raise MergeError(f"a {backend.name} weight cannot be written: {backend.unmergeable_reason}")
            shape = backend.dequantize(module).shape
            if weight.shape != shape:
                raise BaseMismatchError(f"the weight is {tuple(shape)}, not {tuple(weight.shape)}")
            before = backend.snapshot(module)
            change.on_undo(lambda: backend.restore(module, before))
            backend.store(module, weight)

    def remake(self, layer: AdaptedLayer, name: str, config: AdapterConfig) -> None:
        """Rebuilds an adapter on one layer; an adapter that the model does not have is added, on this layer only.

        Args:
            layer: the layer.
            name: the adapter.
            config: its config on this layer; the config's targets are ignored.

        Raises:
            ConfigError: the adapter is of another method, or its config could not express the change.
            MergeError: it is merged.
        """
        manager = self.manager
        path = next(path for path, own in manager.layers.items() if own is layer)
        config = _at(config, path)
        current = manager.configs.get(name)
        if current is None:
            manager.add(name, config, select=False)
            return
        if method_of(current) is not method_of(config):
            raise ConfigError(f"adapter {name!r} is {method_of(current).label}, not {method_of(config).label}")
        others = [other.adapter(name) for other in manager.layers.values() if name in other.adapters]
        present: Any = layer.adapters._modules.get(name)
        if present is not None and (
            source_of(present) is not None or any(source_of(other) is present for other in others)
        ):
            shared = f"adapter {name!r} has the same tensors on {path} and another layer"
            raise ConfigError(f"{shared}: delete it and add it again instead")
        with manager.transaction() as change:
            manager.refuse_merged(f"{name!r} is changed on a layer")
            plan = manager.plan(config, name)
            half = is_half(manager.layers, name)
            parts = build(manager.model, plan, manager.active_state, None, name, half=half)
            manager._keep_structure(change)
            manager.configs[name] = self._with_layer(layer, name, path, config)
            commit(name, parts, change)
            manager._read_tree()
            manager.refresh((name,), change)

    def replace(
        self, layer: AdaptedLayer, name: str, make: Callable[[], Adapter], *kept: MutableMapping[str, Any]
    ) -> None:
        """Replaces an adapter on one layer; its config stays.

        Args:
            layer: the layer.
            name: the adapter.
            make: builds the replacement.
            kept: mappings that ``make`` changes; restored if the command fails.

        Raises:
            UnknownAdapterError: the model has no such adapter.
            MergeError: it is merged.
        """
        manager = self.manager
        with manager.transaction() as change:
            manager.require(name)
            manager.refuse_merged(f"{name!r} is changed on a layer")
            manager._keep_structure(change)
            change.keep(*kept)
            layer.adapters[name] = make()
            manager._slots.pop(name, None)
            manager.refresh((name,), change)

    def _with_layer(self, layer: AdaptedLayer, name: str, path: str, config: AdapterConfig) -> AdapterConfig:
        """The config of an adapter in which one layer has the values of another config, and is a target."""
        manager, target = self.manager, name not in layer.adapters
        changed: AdapterConfig = manager.configs[name].with_layer(path, config, target=target)
        if not target:
            return changed
        paths = {own for own, other in manager.layers.items() if name in other.adapters} | {path}
        if {*manager.plan(changed, name).paths} != paths:
            raise ConfigError(
                f"{path} cannot be named as a target of {name!r} by itself: add an adapter of another name"
            )
        return changed

    def remove(self, layer: AdaptedLayer, name: str) -> None:
        """Deletes an adapter from one layer; state that its layers share moves to another of them.

        Args:
            layer: the layer.
            name: the adapter.

        Raises:
            AdapterError: the adapter on another layer uses the tensors on this one.
            MergeError: it is merged there.
        """
        manager = self.manager
        with manager.transaction() as change:
            if name in layer.merged_names:
                manager.refuse_merged(f"{name!r} is deleted")
            removed = layer.adapter(name)
            held: dict[str, Any] = {
                path: adapted.adapters._modules.get(name) for path, adapted in manager.layers.items()
            }
            others: dict[str, Adapter] = {
                path: adapted for path, adapted in held.items() if adapted is not None and adapted is not removed
            }
            user = next((path for path, other in others.items() if source_of(other) is removed), None)
            if user is not None:
                raise AdapterError(
                    f"adapter {name!r} on {user} uses the tensors that it has here: delete it there first"
                )
            change.keep(layer.adapters._modules)
            change.keep_attributes(layer, "emptied_of")
            change.keep_attributes(manager, "_slots")
            layer.note_method()
            del layer.adapters._modules[name]
            shared = removed._modules.get("shared")
            if shared is not None and others:
                heir = next(iter(others.values()))
                change.keep(heir._modules)
                heir._modules["shared"] = shared
            layer.hide_adapters()
            manager._slots.pop(name, None)
            if not others and name not in manager._tree_with().names():
                manager._keep_structure(change)
                manager._forget([name], change)

    def sync(self) -> None:
        """Runs ``apply_pending`` in a transaction of its own."""
        manager = self.manager
        if manager.active_state.apart:
            with manager.transaction(during_calls=True, quiet=True) as change:
                self.apply_pending(change)

    def apply_pending(self, change: Transaction) -> None:
        """Replaces the activation set on single layers by that of the model, which adopts it where all layers agree."""
        manager = self.manager
        if not manager.active_state.apart:
            return
        states = [layer.active_state for layer in (*manager.layers.values(), *manager.copies.values())]
        apart = [state for state in states if isinstance(state, LayerState)]
        manager._keep_choice(change)
        for layer in manager.active_state.apart:
            change.keep_attributes(layer, "active_state")
        enabled = [getattr(state, "enabled", manager._enabled) for state in states]
        if len(set(enabled)) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled: all are "
                "enabled from now on",
                stacklevel=5,
            )
        alike = len(apart) == len(states) > 0 and len({state.names for state in apart}) == 1
        if alike and apart[0].names and all(name in manager.configs for name in apart[0].names):
            manager._selected = apart[0].names
        manager._enabled = any(enabled)
        manager.active_state.gather()
        manager._publish_active()
