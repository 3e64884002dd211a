"""Commands on a single layer, as in PEFT; commands on the whole model are in the manager."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
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
from nbpeft.engine.runtime.merging import check_merge, partly_merged
from nbpeft.engine.tree.adapted_tree import AdaptedTree
from nbpeft.engine.tree.model_tree import walk
from nbpeft.engine.tree.tied_weights import check_single, layers_to_untie
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import AdapterError, BaseMismatchError, ConfigError, MergeError, StaleModelError


def _at(config: AdapterConfig, path: str) -> AdapterConfig:
    """A copy of a config whose only target is one layer."""
    fields = {"target_modules": re.escape(path), "bias": "none"}
    companion_fields = [method.shares.companion.field for method in companions() if method.shares.companion is not None]
    cleared = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", *companion_fields)
    return config.copy(**fields, **dict.fromkeys(cleared))


@dataclass(frozen=True)
class RemovedAdapter:
    """An adapter whose layers were all removed from the model by other code.

    Attributes:
        config: its config.
        place: its index among the adapters.
        scale: factor on its delta; None if none was set.
        frozen: whether it was frozen.
        unsaved: whether it was trained since it was added, loaded or saved.
        selected_before: adapters that were selected before the removal.
        selected_after: adapters that were selected after it.
    """

    config: AdapterConfig
    place: int
    scale: float | None
    frozen: bool
    unsaved: bool
    selected_before: tuple[str, ...]
    selected_after: tuple[str, ...] = ()

    @classmethod
    def of(cls, manager: Any, name: str, place: int) -> RemovedAdapter:
        """Records the state of an adapter that is still registered."""
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
            raise StaleModelError("the layer belongs to a model that no longer exists")
        return manager

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the model's active adapters; other libraries read them from each layer in turn."""
        return self.manager._chosen

    def foreign_configs(self, wrapper: Wrapper) -> dict[str, AdapterConfig] | None:
        """Configs of the adapters on a layer that was copied or moved here from another model.

        Args:
            wrapper: the adapted layer, or module with copies.

        Returns:
            Adapter name -> config. None if the layer cannot be adopted: it is still part of the other model too, an
            adapter here has the same name and another config, or a config is unknown.
        """
        former = wrapper._shared_state().layer_commands
        own: dict[str, AdapterConfig] = self.manager._configs
        if former is None:  # a copy: its adapters have the names of the original's
            known = own
        else:
            manager = former._manager()
            if manager is None or id(wrapper) in manager._known_tree().wrappers():
                return None
            known = {name: removed.config for name, removed in manager.removed.items()} | manager._configs
        if not all(name in known and own.get(name, known[name]) is known[name] for name in wrapper._named()):
            return None
        return {name: known[name] for name in wrapper._named()}

    def adopt(self, tree: AdaptedTree, change: Transaction) -> bool:
        """Adopts layers that were copied or moved into the model; returns whether there are any."""
        foreign = [(wrapper, self.foreign_configs(wrapper)) for wrapper in tree.others]
        for wrapper, configs in foreign:
            if configs is not None:
                change.keep_attributes(wrapper, "active_state")
                wrapper.__dict__["active_state"] = self.manager.active_state
                self.manager._configs.update(configs)
        return any(configs is not None for _, configs in foreign)

    def update(self, before: AdaptedTree | None, tree: AdaptedTree, change: Transaction) -> bool:
        """Updates the manager after other code changed the module tree.

        Args:
            before: the tree as last read; None for a copied model, whose tree has not been read yet.
            tree: the present tree.
            change: records what is written.

        Returns:
            Whether adapted layers were removed, put back, copied or moved here.
        """
        manager = self.manager
        if self.adopt(tree, change):
            tree = manager._read_tree()
        if before is None:
            return False
        if self._move_prompts(before, tree, change):
            tree = manager._read_tree()
        removed, added = before.without(tree), tree.without(before)
        self._disconnect(removed, before, change)
        if removed:
            take_hooks(called_modules(manager.model), removed, change)
        self._connect(added.values(), change)
        return bool(removed or added)

    def _move_prompts(self, before: AdaptedTree, tree: AdaptedTree, change: Transaction) -> bool:
        """Moves learned prompts to a new input embedding (``set_input_embeddings``); returns whether any were moved."""
        moved: dict[nn.Module, nn.Module] = {}
        for wrapper, modules, name in before.places(before.without(tree)):
            new = modules.get(name)
            if new is None or not isinstance(wrapper, AdaptedLayer):
                continue
            kind, old = resolve_layer_kind(new), wrapper.base_layer
            if wrapper not in moved:
                only_prompts = all(isinstance(one, ModelAdapter) for one in wrapper.adapters._modules.values())
                if new is old or not only_prompts:  # its own base layer in its place: the wrapper was removed
                    continue
                if kind is not wrapper.kind or kind.features(new)[1] != kind.features(old)[1]:
                    continue
                wrapper.replace_base_layer(new, change)
                moved[wrapper] = new
            if moved[wrapper] is new:  # the same module can be in several places
                wrapper.attach(modules, name, change)
        return bool(moved)

    def list_apart(
        self, layers: Sequence[AdaptedLayer], change: Transaction, *, apart: bool, parts: bool = False
    ) -> None:
        """Puts learned prompts outside of the module tree, because a handle lists them, or back into it.

        Args:
            layers: the layers with the prompts.
            change: records what is written.
            apart: whether a handle lists them.
            parts: do so with the modules that adapters have on the model (``PeftNames.on_model``), not with prompts.
        """
        for layer in layers:
            change.keep_attributes(layer, "listed_apart", "parts_listed_apart", "_shown")
            layer.__dict__.update({"parts_listed_apart" if parts else "listed_apart": apart, "_shown": {}})
        for site in [*walk(self.manager.model)] if layers else ():
            if isinstance(site.wrapper, AdaptedLayer) and site.wrapper in layers:
                site.wrapper.attach(site.parent._modules, site.attribute, change)
        if layers:
            change.keep_attributes(self.manager, "_tree", "_slots")
            self.manager._read_tree()

    def unregister(self, names: Sequence[str], change: Transaction) -> None:
        """Unregisters adapters that other code removed from the module tree; it may put them back later."""
        manager = self.manager
        order = [*manager._configs]
        removed = {name: RemovedAdapter.of(manager, name, order.index(name)) for name in names}
        manager._forget(names, change)
        manager.removed.update(
            {name: replace(adapter, selected_after=manager._selected) for name, adapter in removed.items()}
        )

    def _connect(self, wrappers: Iterable[Wrapper], change: Transaction) -> None:
        """Connects layers that other code put into the model, and restores adapters that were removed before."""
        manager, back = self.manager, dict[str, RemovedAdapter]()
        for wrapper in wrappers:
            change.keep_attributes(wrapper, "active_state")
            wrapper.__dict__["active_state"] = manager.active_state
            known = manager.removed.keys() & wrapper._named().keys() - manager._configs.keys()
            back.update({name: manager.removed[name] for name in known})
            if isinstance(wrapper, AdaptedLayer):
                hook_in(manager.model, wrapper, wrapper.adapters._modules.values(), change)
        for name, adapter in sorted(back.items(), key=lambda item: item[1].place):
            adapter.restore(manager, name)
        merged = (name for wrapper in wrappers if isinstance(wrapper, AdaptedLayer) for name in wrapper.merged_names)
        ordered = dict.fromkeys((*manager._merged, *merged))
        manager._merged = tuple(name for name in ordered if name in manager._configs)
        choice = next((adapter for adapter in back.values() if adapter.selected_after == manager._selected), None)
        if choice is not None:  # the selection has not changed since the removal
            manager._selected = tuple(name for name in choice.selected_before if name in manager._configs)

    def _disconnect(self, wrappers: Mapping[int, Wrapper], before: AdaptedTree, change: Transaction) -> None:
        """Gives removed layers a separate activation state, so that they compute as before."""
        shared: ActiveState = self.manager.active_state
        are_back = before.returns(wrappers)
        selected, enabled = self.manager._selected, self.manager._enabled
        for key, wrapper in wrappers.items():
            if wrapper.active_state is shared:
                change.keep_attributes(wrapper, "active_state")
                state = LayerState(shared, selected, enabled=enabled, active=shared.live, is_back=are_back.get(key))
                wrapper.__dict__["active_state"] = state

    def merge(self, layer: AdaptedLayer, names: Sequence[str], *, safe: bool) -> None:
        """Merges adapters into one layer, in addition to those already merged there.

        Args:
            layer: the layer.
            names: adapters to merge; those not on the layer are ignored.
            safe: raise an error if a merged weight is not finite.

        Raises:
            MergeError: the layer does not support merging, a merged weight is not finite (``safe``), or the weight
                is shared with other layers that have merged adapters.
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
            untie = bool(layers_to_untie(manager.model, {"the layer": layer}, together))
            scales = [manager.scale(name) for name in together]
            layer.merge_into_base(together, scales, change, keep_frozen=True, untie=untie)
            self._note_merged((*manager.merged, *together))

    def unmerge(self, layer: AdaptedLayer) -> None:
        """Restores the frozen weight of one layer, bit for bit.

        Raises:
            MergeError: the weight is shared with other layers that have merged adapters.
        """
        with self._unmerging(layer) as change:
            layer.restore_base(change)

    def keep_merged(self, layer: AdaptedLayer) -> None:
        """Makes the merged weight of one layer its frozen weight, to which its adapters add their deltas again.

        Raises:
            MergeError: the weight is shared with other layers that have merged adapters.
        """
        with self._unmerging(layer) as change:
            change.keep_attributes(layer, "merged_names", "_frozen")
            layer.forget_frozen()

    @contextmanager
    def _unmerging(self, layer: AdaptedLayer) -> Iterator[Transaction]:
        """A transaction after which one layer has no merged adapters."""
        manager = self.manager
        with manager.transaction() as change:
            check_single(layer, manager.layers)
            manager._keep_choice(change)
            yield change
            left = {name for other in manager.layers.values() for name in other.merged_names}
            self._note_merged(name for name in manager.merged if name in left)

    def _note_merged(self, names: Iterable[str]) -> None:
        """Updates the names of the adapters that are merged on some layers."""
        manager = self.manager
        manager._merged = tuple(dict.fromkeys(names))
        manager._partly_merged = bool(partly_merged(manager.layers, manager._merged))
        manager._publish_active()

    def set_base_weight(self, layer: AdaptedLayer, weight: Tensor) -> None:
        """Overwrites the frozen weight of one layer, cast or quantized as the present weight.

        Args:
            layer: the layer.
            weight: the new values, in the shape of the layer's dequantized weight.

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

    def rebuild(self, layer: AdaptedLayer, name: str, config: AdapterConfig) -> None:
        """Replaces an adapter on one layer by a new one; adds it on this layer only if the model lacks it.

        Args:
            layer: the layer.
            name: the adapter.
            config: the new config; its targets are ignored.

        Raises:
            ConfigError: the adapter has another method, or its config cannot express the change.
            MergeError: an adapter is merged.
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
        others = [other.adapter(name) for other in manager.layers_with(name).values()]
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
        """Replaces an adapter on one layer without changing its config.

        Args:
            layer: the layer.
            name: the adapter.
            make: builds the replacement.
            *kept: mappings that ``make`` changes; restored if the command fails.

        Raises:
            UnknownAdapterError: the model has no such adapter.
            MergeError: an adapter is merged.
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
        """The config of an adapter with another config's values for one layer, which becomes a target."""
        manager, target = self.manager, name not in layer.adapters
        changed: AdapterConfig = manager.configs[name].with_layer(path, config, target=target)
        if not target:
            return changed
        paths = {*manager.layers_with(name), path}
        if {*manager.plan(changed, name, is_new=False).paths} != paths:
            raise ConfigError(
                f"{path} cannot be added to the targets of {name!r} alone: add an adapter with another name"
            )
        return changed

    def remove(self, layer: AdaptedLayer, name: str) -> None:
        """Deletes an adapter from one layer; the state shared by its layers moves to another layer.

        Args:
            layer: the layer.
            name: the adapter.

        Raises:
            AdapterError: the adapter uses this layer's tensors on another layer too.
            MergeError: the adapter is merged on this layer.
        """
        manager = self.manager
        with manager.transaction() as change:
            if name in layer.merged_names:
                manager.refuse_merged(f"{name!r} is deleted")
            removed = layer.adapter(name)
            others = {
                path: adapted.adapter(name)
                for path, adapted in manager.layers.items()
                if adapted is not layer and name in adapted.adapters
            }
            user = next((path for path, other in others.items() if source_of(other) is removed), None)
            if user is not None:
                raise AdapterError(f"adapter {name!r} on {user} uses this layer's tensors: delete it there first")
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
        """Runs ``apply_pending`` in a separate transaction."""
        manager = self.manager
        if manager.active_state.apart:
            with manager.transaction(during_calls=True, quiet=True) as change:
                self.apply_pending(change)

    def apply_pending(self, change: Transaction) -> None:
        """Ends separate activation of single layers; if all layers agree, the model takes over their selection."""
        manager = self.manager
        if not manager.active_state.apart:
            return
        states = [layer.active_state for layer in (*manager.layers.values(), *manager.copies.values())]
        separate = [state for state in states if isinstance(state, LayerState)]
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
        agree = len(separate) == len(states) > 0 and len({state.names for state in separate}) == 1
        if agree and separate[0].names and all(name in manager.configs for name in separate[0].names):
            manager._selected = separate[0].names
        manager._enabled = any(enabled)
        manager.active_state.gather()
        manager._publish_active()
