"""AdapterManager: owns the adapters on a base model.

Each command checks and builds first and changes the model last, inside one transaction, so that a failed or interrupted
command leaves the model unchanged. Activation is one assignment on the shared ``ActiveState``; ``requires_grad`` is set
only for adapters whose trainability changes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from torch import Tensor, nn

from nbpeft._util.subscribers import Subscribers
from nbpeft.engine.changes.active_state import NO_ADAPTERS, ActiveAdapters, ActiveState
from nbpeft.engine.changes.transaction import Block, Transaction
from nbpeft.engine.config.adapter_names import ByName, check_scale, names_in, unknown_adapter
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, SharedState
from nbpeft.engine.contract.loss_terms import LossTerm
from nbpeft.engine.contract.provider import AdapterProvider
from nbpeft.engine.contract.trained import watch
from nbpeft.engine.injection.biases import BaseBiases
from nbpeft.engine.injection.build import Parts, drop
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.injection.plan import plan
from nbpeft.engine.runtime.adapter_tensors import parameter_slots, saved_weights, shared_state_of
from nbpeft.engine.runtime.adding import Addition
from nbpeft.engine.runtime.layer_commands import LayerCommands, RemovedAdapter
from nbpeft.engine.runtime.merging import (
    check_compatible,
    merge_additional,
    partly_merged,
    unmerge_layers,
    warn_of_requantization,
)
from nbpeft.engine.runtime.method_hooks import extra_loss, hooks_in_training
from nbpeft.engine.runtime.renaming import copy_adapter, place_among, rename
from nbpeft.engine.runtime.scopes import AdapterContext
from nbpeft.engine.runtime.unloading import unload
from nbpeft.engine.tree.adapted_tree import AdaptedTree, read_tree
from nbpeft.engine.tree.model_tree import MANAGER, manager_of
from nbpeft.engine.wrappers.extension import on_models
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.errors import AdapterError, BusyError, MergeError, StaleModelError

_CHOICE = ("_selected", "_enabled", "_merged", "_partly_merged", "_parked", "_parked_layers", "frozen", "_scales")
"""Attributes that say which adapters are active, and how; a failed command restores them."""


def require_manager(model: nn.Module) -> AdapterManager:
    """Returns the manager of a ``PeftModel`` or of an adapted base model.

    Raises:
        AdapterError: the model has no adapters.
    """
    manager = manager_of(model)
    if manager is None:
        raise AdapterError(f"No adapter layers found in the model, a {type(model).__name__}; use get_peft_model first")
    return manager


class AdapterManager:
    """The adapters of one base model and every command on them.

    Attributes:
        model: the base model.
        active_state: the active adapters; read by all wrappers.
        alive: False once the adapters were unloaded; commands then raise StaleModelError.
        frozen: adapters that do not train even while they are active.
        unsaved: adapters that were trained since they were added, loaded or saved.
        owner: token of the only handle that may use the manager.
        kept: the handle, where only the base model refers to it.
        removed: adapters whose layers were all removed from the model by other code.
        provider: loads adapters on demand that are not on the model; None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active_state = ActiveState()
        self._configs = ByName()
        self._tree: AdaptedTree | None = AdaptedTree()
        self.removed: dict[str, RemovedAdapter] = {}
        self.alive = True
        self.frozen: set[str] = set()
        self.unsaved: set[str] = set()
        self._selected: tuple[str, ...] = ()
        self._enabled = True
        self._scales: dict[str, float] = {}
        self._merged: tuple[str, ...] = ()
        self._partly_merged = False
        self._parked: tuple[str, ...] = ()
        self._parked_layers: dict[str, tuple[str, ...]] = {}
        self._slots: dict[str, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        self._biases = BaseBiases(model)
        self._was_trainable: list[nn.Parameter] = []
        self._subscribers = Subscribers()
        self._transaction = Transaction(self.active_state, self._notify)
        self.owner: object | None = None
        self.kept: object | None = None
        self.provider: AdapterProvider | None = None
        self.layer_commands = self.active_state.layer_commands = LayerCommands(self)
        watch(self)

    @property
    def revision(self) -> int:
        """Number that grows with every change, before another thread can make the next change."""
        return self._transaction.revision

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """Adapter name -> config with resolved targets."""
        self._sync_tree()
        return self._configs

    @property
    def layers(self) -> dict[str, AdaptedLayer]:
        """Path -> adapted layer, in model order."""
        return self._known_tree().layers

    def layers_with(self, name: str) -> dict[str, AdaptedLayer]:
        """Path -> layer that has an adapter, in model order."""
        return {path: layer for path, layer in self.layers.items() if name in layer.adapters._modules}

    @property
    def copies(self) -> dict[str, ModulesToSaveWrapper]:
        """Path -> module with copies trained as a whole."""
        return self._known_tree().copies

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, oldest first."""
        return tuple(self.configs)

    @property
    def active(self) -> tuple[str, ...]:
        """Selected adapters, or those of the ``use`` block that is open; active unless disabled."""
        self._sync_tree()
        return self._chosen

    @property
    def _chosen(self) -> tuple[str, ...]:
        scope = self.active_state.scope
        return self._selected if scope is None else scope.names

    @property
    def selected(self) -> tuple[str, ...]:
        """Selected adapters, ignoring open blocks."""
        self._sync_tree()
        return self._selected

    @property
    def enabled(self) -> bool:
        """Whether the selected adapters are active; False inside a block of ``disabled``."""
        scope = self.active_state.scope
        return self._enabled if scope is None else scope.enabled

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters whose deltas are in the base weights now."""
        self._sync_tree()
        return self._merged

    def scale(self, name: str) -> float:
        """Factor on an adapter's delta; 1 unless set."""
        return self._scales.get(name, 1.0)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """All trainable tensors of an adapter, copies and trained base biases included."""
        self.require(name)
        slots = self._slots.get(name)
        if slots is None:
            slots = self._slots[name] = parameter_slots(self.layers, self.copies, name)
        # Read from the slots each time, because sharding and ``Module.to`` replace the tensors.
        tensors = [parameters[key] for parameters, key in slots]
        return [*(parameter for parameter in tensors if parameter is not None), *self._biases.of(name).values()]

    def weights(self, name: str) -> AdapterWeights:
        """References to the tensors of an adapter."""
        with self.reading():
            self.require(name)
            weights = saved_weights(self.layers, self.copies, name, self.configs[name])
            weights.base = self.base_biases(name)
        return weights

    def shared(self, name: str) -> SharedState | None:
        """The state that an adapter's layers share; None if its method has no such state."""
        return shared_state_of(self.layers, name)

    def base_biases(self, name: str) -> dict[str, Tensor]:
        """Name in the bare base model -> bias that an adapter trains (``bias=``)."""
        return dict(self._biases.of(name))

    @property
    def biases(self) -> BaseBiases:
        """The tensors of the base model that adapters train or replace."""
        return self._biases

    def ensure_loaded(self, names: Sequence[str], *, switching: bool = False) -> AbstractContextManager[None]:
        """Loads adapters and keeps them on the model during the block; no effect without an ``AdapterProvider``."""
        return nullcontext() if self.provider is None else self.provider.provide(names, switching=switching)

    def require(self, *names: str) -> None:
        """Raises unless the manager is alive and has all the names.

        Raises:
            StaleModelError: the adapters were unloaded.
            UnknownAdapterError: there is no such adapter.
        """
        self.check_alive()
        for name in names:
            if not isinstance(name, str) or name not in self.configs:
                raise unknown_adapter(name, self.configs)

    def require_available(self, *names: str) -> None:
        """Like ``require``, but adapters that the provider can load count as present."""
        self.require(*(name for name in names if not self.available(name)))

    def available(self, name: str) -> bool:
        """Whether an adapter is on the model or can be loaded by the provider."""
        return name in self.configs or (self.provider is not None and self.provider.can_provide(name))

    def check_alive(self) -> None:
        """Raises StaleModelError once the adapters were unloaded."""
        if not self.alive:
            raise StaleModelError(
                "this handle can no longer be used: its adapters were merged into the base model or unloaded; "
                "use the model that merge_and_unload() or unload() returned"
            )

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls ``callback`` after every change; returns a function that unsubscribes. See ``Subscribers``."""
        return self._subscribers.add(callback)

    def changed(self) -> None:
        """Notifies subscribers; for code that changed tensors directly."""
        self._transaction.report()

    def _notify(self) -> None:
        for failure in self._subscribers.notify():
            warnings.warn(f"{failure} (after the adapters were changed)", stacklevel=4)

    @classmethod
    def attach(cls, model: nn.Module, manager: AdapterManager | None = None) -> AdapterManager:
        """Returns a base model's manager; if it has none, attaches ``manager`` or a new one."""
        attached = manager or manager_of(model) or cls(model)
        with attached.transaction(during_calls=True, quiet=True) as change:
            change.keep_attributes(model, MANAGER, *on_models)
            shown = {attribute: getattr(attached, name) for attribute, name in on_models.items()}
            model.__dict__.update({MANAGER: attached, **shown})
        return attached

    # The module tree

    def _sync_tree(self) -> None:
        """Updates the manager if other code changed the module tree: adapters no longer in it are unregistered."""
        if self._transaction.is_open or (self._tree is not None and self._tree.is_current):
            return
        with self._transaction.reading() as change:
            self._keep_structure(change)
            before, tree = self._tree, self._read_tree()
            moved = self.layer_commands.update(before, tree, change)
            present = self._configs if before is None else self._known_tree().names()
            lost = [name for name in self._configs if name not in present]
            if moved or lost:  # otherwise nothing is refreshed: requires_grad may have been set by hand
                self.layer_commands.unregister(lost, change)
        if moved:
            self.changed()

    def _read_tree(self) -> AdaptedTree:
        self._slots, self._tree = {}, read_tree(self.model, self.active_state)
        return self._tree

    def _tree_with(self, parts: Parts | None = None) -> AdaptedTree:
        """The tree after an adapter was removed, or the parts of one were added."""
        tree = self._tree
        wrappers = () if parts is None else (id(part[1]) for part in (*parts.adapters, *parts.copies))
        # An adapter on layers that already have other adapters does not change the tree.
        known = tree is not None and tree.is_current and all(map(tree.wrappers().__contains__, wrappers))
        return self._read_tree() if tree is None or not known else tree

    def _known_tree(self) -> AdaptedTree:
        self._sync_tree()
        return self._read_tree() if self._tree is None else self._tree  # None in the first transaction of a copy

    def _forget(self, names: Sequence[str], change: Transaction) -> None:
        """Unregisters adapters that are no longer in the module tree, and selects as ``remove`` does."""
        for name in names:
            self._forget_tensors(name, change)
            self._configs.leave(name)
            self._scales.pop(name, None)
            self.frozen.discard(name)

        def remaining(before: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in before if name not in names)

        self._merged, self._parked = remaining(self._merged), remaining(self._parked)
        self._selected = remaining(self._selected) or (self.names[:1] if self._selected else ())
        for scope in self.active_state.scopes:
            scope.names = remaining(scope.names)
        self.refresh(self._selected, change)

    # Adding and removing

    def plan(
        self, config: AdapterConfig, replacing: str | None = None, *, allow_missing: bool = True, is_new: bool = True
    ) -> InjectionPlan:
        """Plans what ``add`` would do, without changing anything; the options are those of ``injection.plan``."""
        return plan(self.model, config, allow_missing=allow_missing, replacing=replacing, is_new=is_new)

    def add(
        self,
        name: str,
        config: AdapterConfig | InjectionPlan,
        weights: AdapterWeights | None = None,
        *,
        trainable: bool = True,
        half: bool = False,
        allow_missing: bool = True,
        replace: bool = False,
        select: bool = True,
        training: bool | None = None,
    ) -> InjectionPlan:
        """Adds a new adapter to the model; the first adapter becomes active.

        Args:
            name: name of the adapter.
            config: its config, or a plan from ``plan``.
            weights: loaded tensors; None to initialize new ones.
            trainable: whether the adapter trains while it is active.
            half: keep its parameters in the base's dtype even if that is half precision.
            allow_missing: only warn about targets that match nothing, if others match.
            replace: replace an adapter of the same name; the new adapter is active if the old one was.
            select: whether the adapter becomes active if it is the only one.
            training: its training mode; None for the mode of the replaced adapter, or of its layers.

        Returns:
            The plan.

        Raises:
            AdapterExistsError: the model has an adapter of this name.
            TargetError: the config does not fit the model.
        """
        settings: dict[str, Any] = {"trainable": trainable, "half": half, "training": training, "replace": replace}
        return self.prepare(name, config, weights, allow_missing=allow_missing, select=select, **settings)()

    def prepare(
        self,
        name: str,
        config: AdapterConfig | InjectionPlan,
        weights: AdapterWeights | None = None,
        *,
        trainable: bool = True,
        allow_missing: bool = True,
        replace: bool = False,
        select: bool = True,
        **modes: Any,
    ) -> Callable[[], InjectionPlan]:
        """Builds a new adapter without touching the model; see ``add`` and, for further arguments, ``build``.

        Returns:
            A function that adds it to the model.
        """
        options = {"trainable": trainable, "allow_missing": allow_missing, "replace": replace, "select": select}
        addition = Addition(self, name, config, weights, modes=modes, **options)
        addition.build()
        return addition.put

    def _freeze_base(self, change: Transaction) -> None:
        """Freezes the parameters that train before the first adapter is added; ``unload`` lets them train again."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._was_trainable = [*self._was_trainable, *trainable]
        change.set_requires_grad(trainable, False)

    def remove(self, name: str) -> None:
        """Deletes an adapter; if no active adapter is left, the oldest becomes active.

        Raises:
            MergeError: the adapter is merged, or it trains biases while another adapter is merged.
        """
        with self.transaction() as change:
            self.require(name)
            if name in self._merged or (self._merged and self._biases.originals(name)):
                raise MergeError(f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first.")
            self.layer_commands.apply_pending(change)
            self._keep_structure(change)
            drop(self.model, name, self.layers.values(), self.copies.values(), change)
            self._tree_with()
            self._forget([name], change)

    def _forget_tensors(self, name: str, change: Transaction) -> None:
        self._slots.pop(name, None)
        self.unsaved.discard(name)
        self._biases.stop(name, change)

    def rename(self, old: str, new: str) -> None:
        """Renames an adapter; its position in all orders stays the same."""
        with self.transaction() as change:
            rename(self, old, new, change)

    def place(self, name: str, place: int) -> None:
        """Moves an adapter to another index among the adapters."""
        with self.transaction() as change:
            place_among(self, name, place, change)

    def copy(self, name: str, new: str) -> None:
        """Adds an independent copy of an adapter under a new name."""
        with self.transaction():
            copy_adapter(self, name, new)

    def _holders(self) -> list[dict[str, Any]]:
        return [layer.adapters._modules for layer in self.layers.values()] + [
            module.modules_to_save._modules for module in self.copies.values()
        ]

    # Changing

    def transaction(self, *, during_calls: bool = False, quiet: bool = False) -> Block:
        """A block whose commands take effect together or not at all.

        During the block no call of the model and no other command runs, and interrupts are delayed until its end. An
        exception undoes its changes.

        Args:
            during_calls: let calls in other threads continue; for commands that only affect later calls.
            quiet: do not notify subscribers.

        Raises:
            BusyError: this thread is inside a call of the model.
        """
        if not quiet:
            self._sync_tree()
        return self._transaction.block(during_calls=during_calls, quiet=quiet)

    def reading(self) -> Block:
        """A block during which other threads run no commands; calls of the model continue."""
        self._sync_tree()
        return self._transaction.reading()

    def deciding(self) -> AbstractContextManager[None]:
        """A block for a command that takes too long for a transaction; see ``Transaction.deciding``."""
        return self._transaction.deciding()

    def _keep_choice(self, change: Transaction) -> None:
        """Records which adapters are active."""
        change.keep_attributes(self, *_CHOICE)
        change.keep_attributes(self.active_state, "live", "traced")
        for scope in self.active_state.scopes:
            change.keep_attributes(scope, "names", "enabled", "active")

    def _keep_structure(self, change: Transaction) -> None:
        """Records which adapters exist, where they are, and which are active."""
        self._keep_choice(change)
        change.keep(self._configs, *self._holders())
        change.keep_attributes(self, "_tree", "_slots", "_was_trainable", "alive", "unsaved")
        self._biases.keep(change)

    # Switching

    def activate(self, names: str | Sequence[str], *, trainable: bool | None = None, enable: bool = False) -> None:
        """Activates adapters instead of the present ones.

        Args:
            names: one name or several, in order.
            trainable: whether they train; None for no change.
            enable: enable adapters if they were disabled.

        Raises:
            UnknownAdapterError: an adapter does not exist.
        """
        chosen = names_in(names)
        with self.ensure_loaded(chosen, switching=True), self.transaction(during_calls=not self._merged) as change:
            self._activate(chosen, trainable, change)
            if enable and not self.enabled:
                self.enable()

    def _activate(self, chosen: tuple[str, ...], trainable: bool | None, change: Transaction) -> None:
        self.check_choice(chosen)
        self.layer_commands.apply_pending(change)
        scope = self.active_state.scope
        if scope is None and self._merged and chosen != self._merged:
            warnings.warn("adapters are merged: unmerging before another is activated", stacklevel=4)
            self.unmerge()
        self._keep_choice(change)
        before = self.active
        while scope is not None and not scope.chooses:
            scope.names = chosen
            scope = scope.outer
        if scope is None:
            self._selected, self._parked = chosen, chosen if chosen == self._parked else ()
        else:
            scope.names = chosen
        if trainable is not None:
            self.frozen = self.frozen - set(chosen) if trainable else self.frozen | set(chosen)
        self.refresh(set(before) ^ set(chosen) if trainable is None else set(before) | set(chosen), change)

    def check_choice(self, names: Sequence[str]) -> None:
        """Raises AdapterError if adapters cannot be active together, UnknownAdapterError if one does not exist."""
        self.require(*names)
        if not names:
            raise AdapterError("no adapter to activate was named; use disable() for the base model without adapters")
        check_compatible(self.copies, self.layers, names)

    def enable(self) -> None:
        """Enables the selected adapters again."""
        self._set_enabled(True)

    def disable(self) -> None:
        """Disables all adapters, which then get no gradient; the selection and ``frozen`` stay the same."""
        self._set_enabled(False)

    def _set_enabled(self, enabled: bool) -> None:
        with self.transaction(during_calls=not self._merged) as change:
            self.check_alive()
            self.layer_commands.apply_pending(change)
            scope = self.active_state.scope
            if scope is None and not enabled and self._merged:
                warnings.warn("adapters are merged: unmerging before they are disabled", stacklevel=4)
                self.unmerge()
            self._keep_choice(change)
            if scope is None:
                self._enabled, self._parked = enabled, self._parked if enabled else ()
            else:
                scope.enabled = enabled
            self.refresh(self.active, change)

    def disabled(self) -> AdapterContext:
        """A block in which this thread or asyncio task uses the base model without adapters."""
        self.layer_commands.sync()
        return AdapterContext(self, None)

    def use(self, names: str | Sequence[str], *, independent: bool = False) -> AdapterContext:
        """A block in which this thread or asyncio task uses other adapters; see ``AdapterContext``."""
        self.layer_commands.sync()
        return AdapterContext(self, names_in(names), independent=independent)

    def select_again(self, names: Sequence[str]) -> None:
        """Activates those of the adapters that still exist or can be loaded."""
        available = tuple(name for name in names if self.available(name))
        if not available or available == self._selected:
            return
        with self.ensure_loaded(available, switching=True), self.transaction(during_calls=not self._merged) as change:
            if present := tuple(name for name in available if name in self.configs):
                self._activate(present, None, change)

    def idle(self, names: Iterable[str]) -> set[str]:
        """The given adapters that are active neither in a block nor outside of blocks."""
        active = [scope.names for scope in self.active_state.scopes if scope.enabled]
        return set(names).difference(*active, self._selected if self._enabled else ())

    def set_scale(self, name: str, scale: float) -> None:
        """Sets the factor on an adapter's delta (1 is the trained strength).

        Raises:
            AdapterError: the scale is not a finite number.
            MergeError: the adapter is merged.
        """
        with self.transaction(during_calls=True) as change:
            self.require(name)
            factor = check_scale(name, scale, fixed=self.configs[name].learns_prompt)
            if name in self._merged:
                raise MergeError(f"adapter {name!r} is merged: unmerge before changing its scale")
            self._keep_choice(change)
            self._scales[name] = factor
            self._publish_active()

    def freeze(self, name: str) -> None:
        """Excludes an adapter from training, active or not."""
        self._set_frozen(name, True)

    def unfreeze(self, name: str) -> None:
        """Lets an adapter train whenever it is active."""
        self._set_frozen(name, False)

    def _set_frozen(self, name: str, frozen: bool) -> None:
        with self.transaction(during_calls=True) as change:
            self.require(name)
            self._keep_choice(change)
            (self.frozen.add if frozen else self.frozen.discard)(name)
            self.refresh((name,), change)

    def set_requires_grad(self, name: str, requires_grad: bool) -> None:
        """Sets ``requires_grad`` of an adapter's tensors, whether or not it is active."""
        with self.transaction(during_calls=True) as change:
            change.set_requires_grad(self.parameters(name), requires_grad)

    def refresh(self, changed: Iterable[str], change: Transaction) -> None:
        """Updates ``requires_grad`` of the changed adapters, and ``active_state``."""
        idle = self.idle(changed)
        for name in changed:
            if name in self.configs:
                change.set_requires_grad(self.parameters(name), name not in idle and name not in self.frozen)
        self._publish_active()

    def _publish_active(self) -> None:
        # If single layers were merged by hand, the others call the selected adapters, as in PEFT.
        merged = () if self._partly_merged else self._merged
        for scope in self.active_state.scopes:
            scope.active = self._with_scales(merged or scope.effective)
        selected = self._selected if self._enabled else ()
        self.active_state.publish(self._with_scales(merged or self._parked or selected))

    def _with_scales(self, names: tuple[str, ...]) -> ActiveAdapters:
        return ActiveAdapters(names, tuple(self._scales.get(name, 1.0) for name in names)) if names else NO_ADAPTERS

    # Calls and training

    def after_backward(self, step: int) -> None:
        """Calls the hooks of the adapters that train; for training loops.

        Call it after the optimizer's step and before ``zero_grad()``, like PEFT's ``update_and_allocate``.

        Args:
            step: index of the optimizer step, from 0.
        """
        for _, hooked in hooks_in_training(self):
            hooked.after_backward(step)

    def extra_loss(self) -> Tensor | None:
        """A scalar, the loss terms of the adapters that train, or None; a loss that contains them stays as it is."""
        extra = extra_loss(self)
        return None if extra is None else extra.as_subclass(LossTerm)

    # Merging

    def merge(self, names: Sequence[str] | None = None, *, safe: bool = False) -> None:
        """Merges the deltas of adapters (default: the active ones) into the base weights.

        Until ``unmerge`` only merged adapters are active, at no cost in forward; disabled adapters are enabled. A copy
        of the frozen weights is kept on the CPU. An interrupt restores the weights bit for bit.

        Args:
            names: adapters to merge in addition to those already merged.
            safe: raise an error if a merged weight is not finite.

        Raises:
            MergeError: a weight does not support merging, or a merged weight is not finite (``safe``).
            AdapterError: two of the adapters trained a copy of the same module.
            BusyError: a block of ``use`` or ``disabled`` is open.
        """
        with self.transaction() as change:
            self.layer_commands.apply_pending(change)
            chosen = self.active if names is None else names_in(names)
            self.require(*chosen)
            together = tuple(dict.fromkeys((*self._merged, *chosen)))
            if self._merged and together == self._merged and not partly_merged(self.layers, self._merged):
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
                return
            check_compatible(self.copies, self.layers, together)
            warn_of_requantization(self.layers, together)
            self._refuse_in_scopes("merging")
            self._merge(together, change, safe=safe)

    def _merge(
        self, together: tuple[str, ...], change: Transaction, *, safe: bool = False, but: Collection[str] = ()
    ) -> None:
        self._keep_choice(change)
        layers = {path: layer for path, layer in self.layers.items() if path not in but}
        merge_additional(self.model, layers, self._merged, together, self.scale, change, safe=safe)
        self._merged, self._partly_merged, self._enabled = together, False, True
        self.refresh(self._selected, change)

    def _refuse_in_scopes(self, what: str) -> None:
        if self.active_state.scopes:
            raise BusyError(f"a use() or disable_adapter() block is open: end it before {what}")

    def unmerge(self) -> None:
        """Restores the frozen weights bit for bit; called inside a ``use`` block, also for the time after the block."""
        with self.transaction() as change:
            self.check_alive()
            if not self._merged and not self._parked:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
                return
            self._keep_choice(change)
            unmerge_layers(self.layers.values(), change)
            self._merged, self._partly_merged, self._parked = (), False, ()
            self._publish_active()

    def unload(self, *, merge: bool, names: Sequence[str] | None = None, safe: bool = False) -> nn.Module:
        """Removes all adapters permanently and returns the base model; see also ``leave_starts``.

        Args:
            merge: merge the deltas first. A copy of the original weights is kept on the CPU until that is done.
            names: adapters to merge; None for the active ones.
            safe: raise an error if a merged weight is not finite.
        """
        with self.transaction() as change:
            unload(self, merge=merge, names=names, safe=safe, change=change)
        return self.model

    def refuse_merged(self, what: str) -> None:
        """Raises MergeError while adapters are merged.

        Args:
            what: the refused command, as a clause after "unmerge before".
        """
        if self._merged:
            raise MergeError(f"{', '.join(map(repr, self._merged))} merged: unmerge before {what}")

    def __getstate__(self) -> dict[str, Any]:
        # Subscribers, the provider and the handle belong to other objects, which are not copied; nor are locks.
        tree = None if self.alive else AdaptedTree()
        state = {
            **self.__dict__,
            "_subscribers": Subscribers(),
            "_slots": {},
            "provider": None,
            "kept": None,
            "_tree": tree,
        }
        del state["_transaction"], state["layer_commands"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transaction = Transaction(self.active_state, self._notify)
        self.layer_commands = self.active_state.layer_commands = LayerCommands(self)
        watch(self)
        self._publish_active()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        # Before its parts are copied: the model and its layers refer back to the manager.
        memo[id(self)] = twin
        twin.__setstate__({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return twin
