"""AdapterManager: the one owner of the adapters on a base model.

Every command checks and builds first and changes the model last, inside one transaction, so that
one that fails or is interrupted leaves it as it was. Activation is one assignment on the shared
switch; ``requires_grad`` is touched only for the adapters whose trainability changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.adapter import AdapterConfig, AdapterWeights, LearnsWithHooks
from nbpeft.engine.build import CollectionPaused, Parts, build, commit, drop, prepare_storage, replace_modules
from nbpeft.engine.holder import AdapterHolder, check_name, check_scale, cloned, names_in
from nbpeft.engine.merging import (
    check_addable,
    check_merge,
    check_together,
    chosen_copy,
    lossy_note,
    merge_besides,
    merge_layers,
    unmerge_layers,
)
from nbpeft.engine.model_tree import MANAGER, manager_of
from nbpeft.engine.plan import InjectionPlan, plan
from nbpeft.engine.registry import method_of
from nbpeft.engine.scopes import ScopedChoice
from nbpeft.engine.switch import NOTHING, Active
from nbpeft.engine.tied_weights import untie_embeddings_
from nbpeft.engine.transaction import Block, Transaction
from nbpeft.errors import AdapterError, AdapterExistsError, BusyError, MergeError

_ATTRIBUTES = (MANAGER, "peft_config")
"""What a base model carries while it is adapted."""


def require_manager(model: nn.Module) -> AdapterManager:
    """Returns the manager of a handle or an adapted base model.

    Raises:
        AdapterError: the model carries no adapters.
    """
    found = manager_of(model)
    if found is None:
        raise AdapterError(f"this {type(model).__name__} carries no adapters; use get_peft_model first")
    return found


class AdapterManager(AdapterHolder):
    """The adapters of one base model and every command on them."""

    @classmethod
    def attach(cls, model: nn.Module, manager: AdapterManager | None = None) -> AdapterManager:
        """Returns a base model's manager, attaching the one given or a new one if it has none."""
        found = manager or manager_of(model) or cls(model)
        with found.transaction(during_calls=True, quiet=True) as change:
            change.keep_attributes(model, *_ATTRIBUTES)
            # PEFT leaves its configs there, where other libraries look for them.
            model.__dict__.update(zip(_ATTRIBUTES, (found, found.configs), strict=True))
        return found

    # Adding and removing

    def plan(self, config: AdapterConfig, replacing: str | None = None, *, allow_missing: bool = True) -> InjectionPlan:
        """What ``add`` would do, in the place of an adapter if one is named; changes nothing."""
        return plan(self.model, config, allow_missing=allow_missing, replacing=replacing)

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
    ) -> InjectionPlan:
        """Puts a new adapter into the model; the first one becomes active.

        Args:
            name: its name.
            config: its config, or a plan made of it.
            weights: loaded tensors to bind instead of initialising.
            trainable: whether it trains while it is active.
            half: keep its parameters in the base's dtype also where that is a half one.
            allow_missing: warn about targets that match nothing instead of refusing.
            replace: take the place of an adapter of the same name, which stays active if it was.
            select: whether it becomes active if it is the only one.

        Raises:
            AdapterExistsError: the name is taken.
            TargetError: the config does not fit the model.
        """
        settings = {"trainable": trainable, "half": half, "allow_missing": allow_missing}
        return self.prepare(name, config, weights, replace=replace, select=select, **settings)()

    def prepare(
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
    ) -> Callable[[], InjectionPlan]:
        """Builds a new adapter without touching the model; see ``add`` for the arguments.

        Returns:
            What puts it into the model.
        """

        def built() -> tuple[int, InjectionPlan, Parts]:
            self._check_addable(name, replace=replace)
            with CollectionPaused():
                made = config
                if not isinstance(made, InjectionPlan):
                    made = self.plan(made, name, allow_missing=allow_missing)
                self._biases.check(name, made.biases)
                check_addable(made, self._merged, self.layers, () if weights is None else weights.base)
                return self.revision, made, build(self.model, made, self.switch, weights, half=half)

        prepared = built()

        def put() -> InjectionPlan:
            with self.transaction() as change:
                _, made, parts = prepared if prepared[0] == self.revision else built()
                self._keep_structure(change)
                if not self.configs:
                    trainable_now = [p for p in self.model.parameters() if p.requires_grad]
                    self._was_trainable = [*self._was_trainable, *trainable_now]
                    change.set_requires_grad(trainable_now, False)
                if name in self.configs:
                    self._forget(name, change)
                    drop(self.model, name, self.layers, self.copies, change, keep=parts)
                if not self.configs:
                    prepare_storage(self.model, change)
                commit(name, parts, self.layers, self.copies, change)
                self.configs[name] = made.config
                self._biases.start(name, made.biases, None if weights is None else weights.base, change)
                (self.frozen.discard if trainable else self.frozen.add)(name)
                if select and not self._selected and len(self.configs) == 1:
                    self._selected = (name,)
                self.refresh(self.names if len(self.configs) == 1 else (name,), change)
            return made

        return put

    def _check_addable(self, name: str, *, replace: bool) -> None:
        self.check_alive()
        check_name(name)
        if name in self.configs and not replace:
            raise AdapterExistsError(f"there is an adapter {name!r} already; delete it first or take another name")
        if name in self._merged:
            self.refuse_merged(f"{name!r} is replaced")

    def remove(self, name: str) -> None:
        """Takes an adapter out; if no active one is left, the oldest becomes active.

        Raises:
            MergeError: it is merged, or trains biases while another is.
        """
        with self.transaction() as change:
            self.require(name)
            if name in self._merged or (self._merged and self._biases.originals(name)):
                self.refuse_merged(f"{name!r} is deleted")
            self._keep_structure(change)
            self._forget(name, change)
            drop(self.model, name, self.layers, self.copies, change)
            del self.configs[name]
            self._scales.pop(name, None)
            self.frozen.discard(name)
            was_active = name in self._selected
            self._selected = tuple(other for other in self._selected if other != name)
            if was_active and not self._selected:
                self._selected = self.names[:1]
            for scope in self.switch.scopes:
                scope.names = tuple(other for other in scope.names if other != name)
            self.refresh(self._selected, change)

    def _forget(self, name: str, change: Transaction) -> None:
        self._slots.pop(name, None)
        self._biases.stop(name, change)

    def rename(self, old: str, new: str) -> None:
        """Gives an adapter another name, at the same place in every order."""
        check_name(new)
        with self.transaction() as change:
            self.require(old)
            if new in self.configs:
                raise AdapterExistsError(f"there is an adapter {new!r} already; take another name")
            if old in self._merged:
                self.refuse_merged(f"{old!r} is renamed")
            self._keep_structure(change)
            for held in (*self._holders(), self.configs):
                if old in held:
                    items = [(new if name == old else name, value) for name, value in held.items()]
                    held.clear()
                    held.update(items)
            self._biases.rename(old, new)
            self._slots.pop(old, None)
            if old in self._scales:
                self._scales[new] = self._scales.pop(old)
            if old in self.frozen:
                self.frozen = (self.frozen - {old}) | {new}
            self._selected = tuple(new if name == old else name for name in self._selected)
            for scope in self.switch.scopes:
                scope.names = tuple(new if name == old else name for name in scope.names)
            self.refresh((), change)

    def copy(self, name: str, new: str) -> None:
        """Makes a second, independent adapter with the same config and weights."""
        self.require(name)
        weights = self.weights(name)
        if weights.base:
            raise AdapterError(f"adapter {name!r} trains base biases, which cannot belong to two adapters")
        shared = {key: value.detach().clone() for key, value in weights.shared.items()}
        twin = AdapterWeights(cloned(weights.adapters), cloned(weights.copies), shared=shared)
        dtypes = {value.dtype for named in twin.adapters.values() for value in named.values()}
        with self.transaction():
            self.add(new, self.configs[name], twin, trainable=name not in self.frozen, half=torch.float32 not in dtypes)
            self.set_scale(new, self.scale(name))

    def _holders(self) -> list[dict[str, Any]]:
        return [layer.adapters._modules for layer in self.layers.values()] + [
            module.modules_to_save._modules for module in self.copies.values()
        ]

    # Changing

    def transaction(self, *, during_calls: bool = False, quiet: bool = False) -> Block:
        """A block in which commands belong together: all of them happen, or none.

        No call of the model and no other command runs meanwhile, interruptions wait for its end, and any
        exception in it undoes what was done.

        Args:
            during_calls: let calls of other threads go on, for commands that only choose what acts in the next.
            quiet: subscribers need not hear of it.

        Raises:
            BusyError: this thread is inside a call of the model itself.
        """
        return self._transaction.block(during_calls=during_calls, quiet=quiet)

    def _keep_choice(self, change: Transaction) -> None:
        """Records who acts."""
        change.keep_attributes(
            self, "_selected", "_enabled", "_merged", "_parked", "_parked_weights", "frozen", "_scales"
        )
        change.keep_attributes(self.switch, "live", "traced")
        for scope in self.switch.scopes:
            change.keep_attributes(scope, "names", "enabled", "active")

    def _keep_structure(self, change: Transaction) -> None:
        """Records which adapters there are, where they hang, and who acts."""
        self._keep_choice(change)
        change.keep(self.configs, self.layers, self.copies, *self._holders())
        change.keep_attributes(self, "_slots", "_was_trainable", "alive")
        self._biases.keep(change)

    # Switching

    def activate(self, names: str | Sequence[str], *, trainable: bool | None = None, enable: bool = False) -> None:
        """Makes these adapters, in this order, the ones that act.

        Args:
            names: one name or several.
            trainable: True or False to (un)freeze them too; None keeps each as it is.
            enable: let them act also where adapters were off.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        chosen = names_in(names)
        with self.supplied(chosen, switching=True), self.transaction(during_calls=not self._merged) as change:
            self._activate(chosen, trainable, change)
            if enable and not self.enabled:
                self.enable()

    def _activate(self, chosen: tuple[str, ...], trainable: bool | None, change: Transaction) -> None:
        self.check_choice(chosen)
        scope = self.switch.scope
        if scope is None and self._merged and chosen != self._merged:
            warnings.warn("adapters are merged: unmerging before another is activated", stacklevel=4)
            self.unmerge()
        self._keep_choice(change)
        before = self.active
        while scope is not None and not scope.chooses:
            scope.names = chosen
            scope = scope.outer
        if scope is None:
            self._selected, self._parked = chosen, ()
        else:
            scope.names = chosen
        if trainable is not None:
            self.frozen = self.frozen - set(chosen) if trainable else self.frozen | set(chosen)
        self.refresh(set(before) ^ set(chosen) if trainable is None else set(before) | set(chosen), change)

    def check_choice(self, names: Sequence[str]) -> None:
        """Raises AdapterError where adapters cannot act together, UnknownAdapterError where one is not there."""
        self.require(*names)
        if not names:
            raise AdapterError("no adapter named to activate; use disable() for the base model alone")
        check_together(self.copies, self.layers, names)

    def enable(self) -> None:
        """Lets the selected adapters act again."""
        self._set_enabled(True)

    def disable(self) -> None:
        """Lets the base model act alone; the selection and every freeze stay."""
        self._set_enabled(False)

    def _set_enabled(self, enabled: bool) -> None:
        self.check_alive()
        with self.transaction(during_calls=not self._merged) as change:
            scope = self.switch.scope
            if scope is None and not enabled and self._merged:
                warnings.warn("adapters are merged: unmerging before they are disabled", stacklevel=4)
                self.unmerge()
            self._keep_choice(change)
            if scope is None:
                self._enabled, self._parked = enabled, ()
            else:
                scope.enabled = enabled
            self._publish_active()

    def disabled(self) -> ScopedChoice:
        """The base model alone inside the block, for this thread or asyncio task; others go on as they are."""
        return ScopedChoice(self, None)

    def use(self, names: str | Sequence[str]) -> ScopedChoice:
        """Other active adapters inside the block, for this thread or asyncio task; others go on as they are."""
        return ScopedChoice(self, names_in(names))

    def select_again(self, names: Sequence[str]) -> None:
        """Activates those that are still there or can be brought, unless others were chosen meanwhile."""
        left = tuple(name for name in names if self.reachable(name))
        if left and left != self._selected:
            self.activate(left)

    def park(self) -> None:
        """Takes merged adapters out of the weights for a block that needs the frozen ones; elsewhere they still act."""
        with self.transaction() as change:
            self._keep_choice(change)
            names = self._merged
            kept = [keep for layer in self.layers.values() if (keep := layer.keep_merged()) is not None]
            self.unmerge()
            self._parked, self._parked_weights = names, kept
            self._publish_active()

    def merge_parked(self) -> None:
        """Merges again what ``park`` took out, as far as it is still there and nothing else was chosen meanwhile."""
        if not self._parked or self.switch.scopes:
            return
        with self.transaction() as change:
            self._keep_choice(change)
            names, kept = self._parked, self._parked_weights
            self._parked, self._parked_weights = (), []
            parked = tuple(name for name in names if name in self.configs)
            if parked:
                self._merge(parked, change)
            if parked == names:
                for put_back in kept:
                    put_back()
            self._publish_active()

    def idle(self, names: Iterable[str]) -> set[str]:
        """Those of the adapters that are selected nowhere: in no scope, and not outside of them."""
        return set(names).difference(self._selected, *(scope.names for scope in self.switch.scopes))

    def set_scale(self, name: str, scale: float) -> None:
        """Sets the factor on an adapter's delta (1 is the trained strength).

        Raises:
            AdapterError: it is no finite number.
            MergeError: the adapter is merged at another scale.
        """
        factor = check_scale(name, scale)
        with self.transaction(during_calls=True) as change:
            self.require(name)
            if name in (*self._merged, *self._parked):
                raise MergeError(f"adapter {name!r} is merged: unmerge before changing its scale")
            self._keep_choice(change)
            self._scales[name] = factor
            self._publish_active()

    def freeze(self, name: str) -> None:
        """Stops an adapter from training, active or not."""
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
        """Sets whether gradients reach an adapter's tensors now, whatever is active."""
        with self.transaction(during_calls=True) as change:
            change.set_requires_grad(self.parameters(name), requires_grad)

    def refresh(self, changed: Iterable[str], change: Transaction) -> None:
        """Brings ``requires_grad`` of some adapters and the shared switch up to date."""
        idle = self.idle(changed)
        for name in changed:
            if name in self.configs:
                change.set_requires_grad(self.parameters(name), name not in idle and name not in self.frozen)
        self._publish_active()

    def _publish_active(self) -> None:
        for scope in self.switch.scopes:
            scope.active = self._acting(self._merged or (scope.names if scope.enabled else ()))
        self.switch.publish(self._acting(self._merged or self._parked or (self._selected if self._enabled else ())))

    def _acting(self, names: tuple[str, ...]) -> Active:
        return Active(names, tuple(self._scales.get(name, 1.0) for name in names)) if names else NOTHING

    # Calls and training

    @property
    def prepares_calls(self) -> bool:
        """Whether the method of an active adapter prepares something for each call of the model."""
        return any(method_of(self.configs[name]).call_context is not None for name in self.active)

    def in_call(self, active: Active, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Active:
        """What is active in one call of the model, with what the methods prepare for it.

        Args:
            active: what is active.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
        """
        names = active.names if active.rows is None else active.rows.names
        context = {}
        for name in names:
            prepare = method_of(self.configs[name]).call_context if name in self.configs else None
            if prepare is not None:
                context[name] = prepare(self.configs[name], args, kwargs)
        return replace(active, context=context) if context else active

    def after_backward(self, step: int) -> None:
        """Calls the hooks of the adapters that train; for training loops, once their gradients are there.

        Call it after the optimizer's step and before ``zero_grad()``, as PEFT's ``update_and_allocate``.

        Args:
            step: number of the optimizer step, from 0.
        """
        for hooked in self._hooked():
            hooked.after_backward(step)

    def extra_loss(self) -> Tensor | None:
        """The sum of what the adapters that train add to the loss, a scalar; None if that is nothing."""
        losses = [loss for hooked in self._hooked() if (loss := hooked.extra_loss()) is not None]
        return sum(losses[1:], losses[0]) if losses else None

    def _hooked(self) -> Iterator[LearnsWithHooks]:
        """What of the adapters that train takes part in training beside the gradient."""
        for name in self.active if self.enabled else ():
            method = method_of(self.configs[name])
            hooked = (
                issubclass(method.adapter_class, LearnsWithHooks),
                issubclass(method.shared or object, LearnsWithHooks),
            )
            if name in self.frozen or not any(hooked):
                continue
            found: list[Any] = [self.shared(name)]
            found += [layer.adapters._modules.get(name) for layer in self.layers.values()]
            yield from (one for one in found if isinstance(one, LearnsWithHooks))

    # Merging

    def merge(self, names: Sequence[str] | None = None, *, safe: bool = False) -> None:
        """Folds the deltas of adapters (default: the active ones) into the base weights.

        Until ``unmerge`` they alone act, at no cost in forward, with those merged before; adapters
        that were off are on then. A copy of the frozen weights is kept on the CPU. An interruption
        puts the weights back, bit for bit.

        Raises:
            MergeError: a weight cannot be merged into, or would not be finite (``safe``).
            AdapterError: two of them each trained a copy of one module.
            BusyError: a block of ``use`` or ``disabled`` is open, which needs the frozen weights.
        """
        chosen = self.active if names is None else names_in(names)
        self.require(*chosen)
        together = tuple(dict.fromkeys((*self._merged, *chosen)))
        if self._merged and together == self._merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
            return
        check_together(self.copies, self.layers, together)
        lossy_note(self.layers)
        with self.transaction() as change:
            self._refuse_in_scopes("merging")
            self._merge(together, change, safe=safe)

    def _merge(self, together: tuple[str, ...], change: Transaction, *, safe: bool = False) -> None:
        self._keep_choice(change)
        merge_besides(self.model, self.layers, self._merged, together, self.scale, change, safe=safe)
        self._merged, self._enabled = together, True
        self._publish_active()

    def _refuse_in_scopes(self, what: str) -> None:
        if self.switch.scopes:
            raise BusyError(f"a use() or disable_adapter() block is open: leave it before {what}")

    def unmerge(self) -> None:
        """Puts the frozen weights back, bit for bit."""
        self.check_alive()
        if not self._merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        with self.transaction() as change:
            self._keep_choice(change)
            unmerge_layers(self.layers.values(), change)
            self._merged = ()
            self._publish_active()

    def unload(self, *, merge: bool, names: Sequence[str] | None = None, safe: bool = False) -> nn.Module:
        """Takes all adapters out for good and returns the bare base model.

        Args:
            merge: fold the deltas in first. What the weights were is kept on the CPU until that is done.
            names: adapters to merge; the active ones if None.
            safe: refuse weights that would not be finite.
        """
        self.check_alive()
        chosen: tuple[str, ...] = ()
        if merge:
            chosen = self.active if names is None else names_in(names)
            self.require(*chosen)
            check_together(self.copies, self.layers, chosen)
            if not self._merged:
                check_merge(self.layers, chosen, self.scale, safe=safe)
                lossy_note(self.layers)
        with self.transaction() as change:
            self._refuse_in_scopes("unloading")
            self._keep_structure(change)
            if self._merged and set(self._merged) != set(chosen):
                unmerge_layers(self.layers.values(), change)
                self._merged = ()
                if merge:
                    check_merge(self.layers, chosen, self.scale, safe=safe)
            if merge and not self._merged:
                merge_layers(self.model, self.layers, chosen, self.scale, change, keep_frozen=False)
            self._dismantle(chosen, change)
            if merge:
                untie_embeddings_(self.model, change)
        return self.model

    def _dismantle(self, merged: Sequence[str], change: Transaction) -> None:
        for name in self.configs:
            if name in merged:
                self._biases.forget(name)
            else:
                self._biases.stop(name, change)
        replacements: dict[int, nn.Module] = {id(layer): layer.base_layer for layer in self.layers.values()}
        replacements.update({id(module): chosen_copy(module, merged) for module in self.copies.values()})
        replace_modules(self.model, replacements, change)
        change.set_requires_grad(self._was_trainable, True)
        change.keep_attributes(self, "layers", "copies", "configs")
        change.keep_attributes(self.model, *_ATTRIBUTES)
        self.alive = False
        self.layers, self.copies, self.configs, self._slots = {}, {}, {}, {}
        self._was_trainable, self._selected, self._merged = [], (), ()
        self.switch.publish(NOTHING)
        for attribute in _ATTRIBUTES:
            self.model.__dict__.pop(attribute, None)

    def refuse_merged(self, what: str) -> None:
        """Raises MergeError while adapters are merged.

        Args:
            what: what cannot be done then, to follow "unmerge before".
        """
        if self._merged:
            raise MergeError(f"{', '.join(map(repr, self._merged))} merged: unmerge before {what}")
