"""AdapterManager: the one owner of the adapters on a base model.

Every command checks and builds first and changes the model last, so that one that fails leaves
it as it was. Activation is one assignment on the shared switch; ``requires_grad`` is touched
only for the adapters whose trainability changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nbpeft.engine.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.build import build, collection_paused, commit, drop, prepare_storage, replace_modules
from nbpeft.engine.holder import AdapterHolder, check_name, check_scale, cloned, names_in
from nbpeft.engine.merging import (
    check_merge,
    check_together,
    chosen_copy,
    lossy_note,
    merge_besides,
    merge_layers,
    unmerge_layers,
)
from nbpeft.engine.plan import InjectionPlan, plan
from nbpeft.engine.shared import part_for_good
from nbpeft.engine.switch import NOTHING, Active
from nbpeft.errors import AdapterError, AdapterExistsError, MergeError

_ATTRIBUTE = "_nbpeft_manager"


class AdapterManager(AdapterHolder):
    """The adapters of one base model and every command on them."""

    @classmethod
    def of(cls, model: nn.Module) -> AdapterManager | None:
        """The manager of a base model, or None if it carries no adapters."""
        manager = model.__dict__.get(_ATTRIBUTE)
        return manager if isinstance(manager, AdapterManager) else None

    @classmethod
    def attach(cls, model: nn.Module, manager: AdapterManager | None = None) -> AdapterManager:
        """Makes a manager findable by ``of``; without one, the model's own or a new one."""
        found = manager or cls.of(model) or cls(model)
        model.__dict__[_ATTRIBUTE] = found
        model.__dict__["peft_config"] = found.configs  # where PEFT leaves it, and where other libraries look
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
        self.check_alive()
        check_name(name)
        if name in self.configs and not replace:
            raise AdapterExistsError(f"there is an adapter {name!r} already; delete it first or take another name")
        self._require_unmerged("adding an adapter")
        with collection_paused():
            made = config if isinstance(config, InjectionPlan) else self.plan(config, name, allow_missing=allow_missing)
            self._biases.check(name, made.biases)
            parts = build(self.model, made, self.switch, weights, half=half)
        with self.switch.exclusive():
            if not self.configs:
                self._was_trainable += [p for p in self.model.parameters() if p.requires_grad]
                self.model.requires_grad_(False)
            if name in self.configs:
                self._forget(name)
                drop(self.model, name, self.layers, self.copies, keep=parts)
            if not self.configs:
                prepare_storage(self.model)
            commit(name, parts, self.layers, self.copies)
            self.configs[name] = made.config
            self._biases.start(name, made.biases, None if weights is None else weights.base)
            (self.frozen.discard if trainable else self.frozen.add)(name)
            if select and not self._selected and len(self.configs) == 1:
                self._selected = (name,)
            self._refresh(self.names if len(self.configs) == 1 else (name,))
        self.changed()
        return made

    def remove(self, name: str) -> None:
        """Takes an adapter out; if no active one is left, the oldest becomes active.

        Raises:
            MergeError: adapters are merged.
        """
        self.require(name)
        self._require_unmerged("deleting an adapter")
        with self.switch.exclusive():
            self._forget(name)
            drop(self.model, name, self.layers, self.copies)
            del self.configs[name]
            self._scales.pop(name, None)
            self.frozen.discard(name)
            was_active = name in self._selected
            self._selected = tuple(other for other in self._selected if other != name)
            if was_active and not self._selected:
                self._selected = self.names[:1]
            self._refresh(self._selected)
        self.changed()

    def _forget(self, name: str) -> None:
        self._slots.pop(name, None)
        self._biases.stop(name)

    def rename(self, old: str, new: str) -> None:
        """Gives an adapter another name, at the same place in every order."""
        self.require(old)
        check_name(new)
        if new in self.configs:
            raise AdapterExistsError(f"there is an adapter {new!r} already; take another name")
        self._require_unmerged("renaming an adapter")
        with self.switch.exclusive():
            for holder in (*self._holders(), self.configs):
                if old in holder:
                    items = [(new if name == old else name, module) for name, module in holder.items()]
                    holder.clear()
                    holder.update(items)
            self._biases.rename(old, new)
            self._slots.pop(old, None)
            if old in self._scales:
                self._scales[new] = self._scales.pop(old)
            if old in self.frozen:
                self.frozen = (self.frozen - {old}) | {new}
            self._selected = tuple(new if name == old else name for name in self._selected)
            self._refresh(())
        self.changed()

    def copy(self, name: str, new: str) -> None:
        """Makes a second, independent adapter with the same config and weights."""
        self.require(name)
        weights = self.weights(name)
        if weights.base:
            raise AdapterError(f"adapter {name!r} trains base biases, which cannot belong to two adapters")
        twin = AdapterWeights(cloned(weights.adapters), cloned(weights.copies))
        dtypes = {value.dtype for named in twin.adapters.values() for value in named.values()}
        self.add(new, self.configs[name], twin, trainable=name not in self.frozen, half=torch.float32 not in dtypes)
        self.set_scale(new, self.scale(name))

    def _holders(self) -> list[dict[str, Any]]:
        return [layer.adapters._modules for layer in self.layers.values()] + [
            module.modules_to_save._modules for module in self.copies.values()
        ]

    # Switching

    def activate(self, names: str | Sequence[str], *, trainable: bool | None = None) -> None:
        """Makes these adapters, in this order, the ones that act.

        Args:
            names: one name or several.
            trainable: True or False to (un)freeze them too; None keeps each as it is.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        chosen = names_in(names)
        with self.supplied(chosen, switching=True):
            self._activate(chosen, trainable)
        self.changed()

    def _activate(self, chosen: tuple[str, ...], trainable: bool | None) -> None:
        self.require(*chosen)
        if not chosen:
            raise AdapterError("no adapter named to activate; use disable() for the base model alone")
        check_together(self.copies, self.layers, chosen)
        if self._merged and chosen != self._merged:
            warnings.warn("adapters are merged: unmerging before another is activated", stacklevel=4)
            self.unmerge()
        if trainable is not None:
            self.frozen = self.frozen - set(chosen) if trainable else self.frozen | set(chosen)
        changed = set(self._selected) ^ set(chosen) if trainable is None else set(self._selected) | set(chosen)
        self._selected = chosen
        self._refresh(changed)

    def enable(self) -> None:
        """Lets the selected adapters act again."""
        self._set_enabled(True)

    def disable(self) -> None:
        """Lets the base model act alone; the selection and every freeze stay."""
        self._set_enabled(False)

    def _set_enabled(self, enabled: bool) -> None:
        self.check_alive()
        if not enabled and self._merged:
            warnings.warn("adapters are merged: unmerging before they are disabled", stacklevel=4)
            self.unmerge()
        self._enabled = enabled
        self._publish_active()
        self.changed()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone inside the block; afterwards everything is as it was."""
        was, merged = self._enabled, self._merged
        self.disable()
        try:
            yield
        finally:
            self._set_enabled(was)
            if merged:
                self.merge(merged)

    @contextmanager
    def use(self, names: str | Sequence[str]) -> Iterator[None]:
        """Other active adapters inside the block; afterwards everything is as it was."""
        was, enabled, merged = self._selected, self._enabled, self._merged
        self.activate(names)
        self._set_enabled(True)
        try:
            yield
        finally:
            self._activate_again(was)
            if self._enabled is not enabled:
                self._set_enabled(enabled)
            if merged and not self._merged:
                self.merge([name for name in merged if name in self.configs])

    def _activate_again(self, names: tuple[str, ...]) -> None:
        """Activates those that are still there; none where none were active before."""
        left = tuple(name for name in names if self.reachable(name))
        if left:
            self.activate(left)
        elif not names:
            before, self._selected = self._selected, ()
            self._refresh(before)

    def set_scale(self, name: str, scale: float) -> None:
        """Sets the factor on an adapter's delta (1 is the trained strength).

        Raises:
            AdapterError: it is no finite number.
            MergeError: the adapter is merged at another scale.
        """
        self.require(name)
        factor = check_scale(name, scale)
        if name in self._merged:
            raise MergeError(f"adapter {name!r} is merged: unmerge before changing its scale")
        self._scales[name] = factor
        self._publish_active()
        self.changed()

    def freeze(self, name: str) -> None:
        """Stops an adapter from training, active or not."""
        self.require(name)
        self.frozen.add(name)
        self._refresh((name,))
        self.changed()

    def unfreeze(self, name: str) -> None:
        """Lets an adapter train whenever it is active."""
        self.require(name)
        self.frozen.discard(name)
        self._refresh((name,))
        self.changed()

    def set_requires_grad(self, name: str, requires_grad: bool) -> None:
        """Sets whether gradients reach an adapter's tensors now, whatever is active."""
        for parameter in self.parameters(name):
            parameter.requires_grad_(requires_grad)
        self.changed()

    def _refresh(self, changed: Sequence[str] | set[str] | tuple[str, ...]) -> None:
        """Brings ``requires_grad`` of some adapters and the shared switch up to date."""
        for name in changed:
            if name in self.configs:
                trains = name in self._selected and name not in self.frozen
                for parameter in self.parameters(name):
                    parameter.requires_grad = trains
        self._publish_active()

    def _publish_active(self) -> None:
        names = self._merged or (self._selected if self._enabled else ())
        self.switch.live = Active(names, tuple(self._scales.get(name, 1.0) for name in names)) if names else NOTHING

    # Merging

    def merge(self, names: Sequence[str] | None = None, *, safe: bool = False) -> None:
        """Folds the deltas of adapters (default: the active ones) into the base weights.

        Until ``unmerge`` they alone act, at no cost in forward, with those merged before; adapters
        that were off are on then. A copy of the frozen weights is kept on the CPU.

        Raises:
            MergeError: a weight cannot be merged into, or would not be finite (``safe``).
            AdapterError: two of them each trained a copy of one module.
        """
        chosen = self._selected if names is None else names_in(names)
        self.require(*chosen)
        together = tuple(dict.fromkeys((*self._merged, *chosen)))
        if self._merged and together == self._merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
            return
        check_together(self.copies, self.layers, together)
        lossy_note(self.layers)
        with self.switch.exclusive():
            merge_besides(self.model, self.layers, self._merged, together, self.scale, safe=safe)
            self._merged, self._enabled = together, True
            self._publish_active()
        self.changed()

    def unmerge(self) -> None:
        """Puts the frozen weights back, bit for bit."""
        self.check_alive()
        if not self._merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        with self.switch.exclusive():
            unmerge_layers(list(self.layers.values()))
            self._merged = ()
            self._publish_active()
        self.changed()

    def unload(self, *, merge: bool, names: Sequence[str] | None = None, safe: bool = False) -> nn.Module:
        """Takes all adapters out for good and returns the bare base model.

        Args:
            merge: fold the deltas in first.
            names: adapters to merge; the active ones if None.
            safe: refuse weights that would not be finite.
        """
        self.check_alive()
        chosen: tuple[str, ...] = ()
        if merge:
            chosen = self._selected if names is None else names_in(names)
            self.require(*chosen)
            check_together(self.copies, self.layers, chosen)
            if self._merged and set(self._merged) != set(chosen):
                self.unmerge()
            if not self._merged:
                check_merge(self.layers, chosen, safe=safe)
                lossy_note(self.layers)
        with self.switch.exclusive():
            if merge and not self._merged:
                merge_layers(self.model, self.layers, chosen, self.scale, keep_snapshot=False)
            elif not merge:
                unmerge_layers(list(self.layers.values()))
            self._dismantle(chosen)
            if merge:
                part_for_good(self.model)
        self.changed()
        return self.model

    def _dismantle(self, merged: Sequence[str]) -> None:
        for name in self.configs:
            (self._biases.forget if name in merged else self._biases.stop)(name)
        replacements: dict[int, nn.Module] = {id(layer): layer.base_layer for layer in self.layers.values()}
        replacements.update({id(module): chosen_copy(module, merged) for module in self.copies.values()})
        replace_modules(self.model, replacements)
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        self.alive = False
        self.layers, self.copies, self.configs, self._slots = {}, {}, {}, {}
        self._was_trainable, self._selected, self._merged = [], (), ()
        self.switch.live = NOTHING
        for attribute in (_ATTRIBUTE, "peft_config"):
            self.model.__dict__.pop(attribute, None)

    def _require_unmerged(self, what: str) -> None:
        if self._merged:
            raise MergeError(f"{', '.join(map(repr, self._merged))} merged: unmerge before {what}")
