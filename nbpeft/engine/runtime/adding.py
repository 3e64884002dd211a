"""Adding an adapter: it is built first, without touching the model, and put into the model in one transaction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, note_use
from nbpeft.engine.injection.build import CollectionPaused, Parts, build, commit, drop, prepare_storage
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.merging import check_addable
from nbpeft.errors import AdapterExistsError


@dataclass(eq=False)
class Addition:
    """A new adapter: ``build`` it, then ``put`` it into the model.

    Args:
        manager: the model's manager.
        name: name of the adapter.
        config: its config, or a plan for it.
        weights: loaded tensors; None to initialize new ones.
        trainable: whether it trains while it is active.
        allow_missing: only warn about targets that match nothing, if others match.
        replace: replace an adapter of the same name.
        select: whether it becomes active if it is the only one.
        modes: further arguments of ``nbpeft.engine.injection.build.build``.
    """

    manager: Any
    name: str
    config: AdapterConfig | InjectionPlan
    weights: AdapterWeights | None
    trainable: bool
    allow_missing: bool
    replace: bool
    select: bool
    modes: dict[str, Any]
    _built: tuple[int, InjectionPlan, Parts] = field(init=False)
    """The manager's revision for which it was built, the plan, and the new modules."""

    def build(self) -> None:
        """Plans the adapter and creates its modules, without touching the model.

        Raises:
            AdapterExistsError: the model has an adapter of this name.
            MergeError: it cannot be added while other adapters are merged.
            TargetError: the config does not fit the model.
        """
        manager, name, weights = self.manager, self.name, self.weights
        manager.check_alive()
        check_name(name)
        if name in manager.configs and not self.replace:
            raise AdapterExistsError(f"Adapter with name {name!r} already exists; delete it or choose another name")
        if name in manager.merged:
            manager.refuse_merged(f"{name!r} is replaced")
        with CollectionPaused():
            plan = self.config
            if not isinstance(plan, InjectionPlan):
                plan = manager.plan(plan, name, allow_missing=self.allow_missing)
            manager.biases.check(name, plan.biases)
            check_addable(plan, manager.merged, manager.layers, () if weights is None else weights.base)
            parts = build(manager.model, plan, manager.active_state, weights, name, **self.modes)
            self._built = manager.revision, plan, parts

    def put(self) -> InjectionPlan:
        """Adds the adapter to the model, and returns its plan; it is built again if the adapters have changed."""
        with self.manager.transaction() as change, CollectionPaused():
            if self._built[0] != self.manager.revision:
                self.build()
            _, plan, parts = self._built
            self._commit(plan, parts, change)
        return plan

    def _commit(self, plan: InjectionPlan, parts: Parts, change: Transaction) -> None:
        manager, name = self.manager, self.name
        manager._keep_structure(change)
        manager.layer_commands.adopt(manager._known_tree() if manager.configs else manager._read_tree(), change)
        if not manager.configs:
            manager._freeze_base(change)
        if name in manager.configs:
            manager._forget_tensors(name, change)
            manager._scales.pop(name, None)
            drop(manager.model, name, manager.layers.values(), manager.copies.values(), change, keep=parts)
        if not manager.configs:
            prepare_storage(manager.model, change)
        manager._tree_with(commit(name, parts, change))
        manager.configs[name] = note_use(plan.config)
        manager.biases.start(name, plan.biases, None if self.weights is None else self.weights.base, change)
        (manager.frozen.discard if self.trainable else manager.frozen.add)(name)
        if self.select and not manager._selected and len(manager.configs) == 1:
            manager._selected = (name,)
        manager.refresh(manager.names if len(manager.configs) == 1 else (name,), change)
