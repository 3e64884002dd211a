"""Creates the adapters of a sweep, selects the best one, and restores the model if nothing was learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import learns_with_hooks
from nbpeft.engine.runtime.snapshots import undo_additions
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterExistsError, ConfigError, TrainingError, TrainingInterrupted
from nbpeft.sweeps import OWN_FIELDS, Sweep, check_own, combinations, names_of, not_swept, of_config, swept
from nbpeft.training.adapters.adapted_model import trainable
from nbpeft.training.monitor.result import TrainResult
from nbpeft.training.objectives.objective import Objective
from nbpeft.training.request import TrainRequest
from nbpeft.training.sweep.members import Member, SideBySide
from nbpeft.training.sweep.result import SweepResult
from nbpeft.training.sweep.trainer import trainer_for
from nbpeft.training.transformers.arguments import build_arguments, split_arguments


def side_by_side(train: Callable[[TrainRequest], TrainResult], request: TrainRequest) -> TrainResult:
    """Trains with ``sweep(…)`` as a field, or with ``members``: adapters with their own fields.

    Afterwards the best adapter is active; if no step was done, the model is restored.
    """
    interrupted: TrainingInterrupted | None = None
    with _members(request) as group:
        try:
            result = train(_request_of_group(request, group))
        except TrainingInterrupted as error:
            interrupted, result = error, error.result
    found = SweepResult.of(result, group.fields())
    if interrupted is not None:
        raise TrainingInterrupted(str(interrupted), found)
    return found


def _request_of_group(request: TrainRequest, group: SideBySide) -> TrainRequest:
    """Returns the request for training all members together, and sets the arguments of each member."""
    common = {name: value for name, value in request.arguments.items() if not isinstance(value, Sweep)}
    halving = request.halving or any(sweep.halving for sweep in swept(request.given).values())
    request = dataclasses.replace(request, members=group, adapter=None, halving=halving, arguments=common)
    trainer_class, kind = request.trainer_class, request.arguments_class
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, transformers.Trainer)):
        return request  # the training refuses it later
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in common.items() if name in known}
    chosen = trainer_for(trainer_class, group, request.given)
    objective = request.objective
    assert isinstance(objective, Objective)
    of_objective = objective.own_fields()
    for member in group.members:
        changed = {name: value for name, value in member.fields.items() if name in of_objective}
        member.objective = dataclasses.replace(objective, **changed)
        own = {**fields, **{name: value for name, value in member.fields.items() if name not in changed}}
        member.arguments = build_arguments(own, kind, folder="", evaluates=request.eval_data is not None)
        if member.arguments.world_size > 1 or member.arguments.n_gpu > 1:
            raise ConfigError("a sweep trains on one device: use one process with one visible device")
    group.name_settings(dict.fromkeys(field for member in group.members for field in member.fields))
    return dataclasses.replace(request, trainer_class=chosen)


@contextmanager
def _members(request: TrainRequest) -> Iterator[SideBySide]:
    """Yields the adapters, which are trained inside the block; afterwards the best is active, if they learned."""
    model, members = request.model, request.members
    manager = manager_of(model)
    if manager is None:
        raise TrainingError(f"a sweep needs adapters of nbpeft, which a {type(model).__name__} does not have")
    manager.refuse_merged("a sweep")
    if members is not None and swept(request.given):
        name = next(iter(swept(request.given)))
        raise ConfigError(f"{name} is a sweep, but the adapters to train and their fields are given", field=name)
    if members is not None and request.adapter is not None:
        raise ConfigError("adapter cannot be combined with members, which names the adapters to train", field="adapter")
    with DeferredInterrupts() as interrupts:
        selected, enabled = manager.selected, manager.enabled
        group, added = None, list[str]()
        try:
            if members is None:
                found, start = _new_members(manager, request, added), _start_of(manager, request)
            else:
                found, start = _existing_members(manager, members, request.objective), ""
            group = SideBySide(model, found, start)
            manager.activate(group.names[0])  # other active adapters would be trained too
            with group.opened:
                group.opened.enter_context(manager.use(group.names, independent=True))
                _check_alone(model, group)
                with interrupts.released():
                    yield group
        finally:
            with DeferredInterrupts(to_the_end=True), manager.transaction():
                if group is not None and group.learned:
                    manager.activate(group.best(selected), enable=True)
                else:
                    undo_additions(manager, added, selected, enabled=enabled)


def _new_members(manager: AdapterManager, request: TrainRequest, added: list[str]) -> list[Member]:
    """Returns new adapters for every combination of values: copies of one, or initialized ones if the config varies.

    ``added`` receives each name before the adapter is added, because an interruption can come any time.
    """
    origin = _origin(manager, request.adapter)
    config, fields = manager.configs[origin], swept(request.given)
    own = (*OWN_FIELDS, *_own_fields(request.objective))
    strange = {name: sweep for name, sweep in fields.items() if name not in (*own, *of_config(config, fields))}
    split_arguments(strange, transformers.Trainer, request.arguments_class, others=own)
    for name in strange:
        raise not_swept(name)
    combined = list(combinations(fields))
    names = names_of(origin, combined)
    with manager.transaction():
        for name, values in zip(names, combined, strict=True):
            check_name(name)
            if name in manager.configs:
                message = f"{name!r} exists already, and a sweep makes its adapters anew: delete or rename it first"
                raise AdapterExistsError(message, name=name)
            changed = {field: value for field, value in values.items() if field not in own}
            first = request.seed if changed else request.first_random
            added.append(name)
            if first is not None:
                with drawing_from(first):
                    manager.add(name, dataclasses.replace(config, **changed), trainable=True, select=False)
            else:
                manager.copy(origin, name)
                manager.unfreeze(name)
        return [
            Member(name, {key: values[key] for key in values if key in own}, values, manager.parameters(name))
            for name, values in zip(names, combined, strict=True)
        ]


def _start_of(manager: AdapterManager, request: TrainRequest) -> str:
    """Returns how the adapters of a sweep start, for the user."""
    origin = _origin(manager, request.adapter)
    if of_config(manager.configs[origin], swept(request.given)):
        return "each adapter starts from new weights"
    if request.first_random is None:
        return f"each adapter starts as a copy of {origin!r}"
    if isinstance(request.first_random, int):  # a seed
        return f"each adapter starts from new weights: the initial ones of {origin!r} are unknown"
    return f"each adapter starts from the initial weights of {origin!r}, which itself is not changed"


def _origin(manager: AdapterManager, adapter: Any) -> str:
    """Returns the adapter from which a sweep starts."""
    if adapter is not None:
        manager.require(adapter)
        return str(adapter)
    if len(manager.active) != 1:
        names = ", ".join(map(repr, manager.active)) or "none"
        raise TrainingError(f"a sweep starts from one adapter (active: {names}): name it with adapter=…")
    return manager.active[0]


def _own_fields(objective: Any) -> tuple[str, ...]:
    return objective.own_fields() if isinstance(objective, Objective) else ()


def _existing_members(manager: AdapterManager, members: Any, objective: Any) -> list[Member]:
    """Returns existing adapters with their own fields as members."""
    fields_of = isinstance(members, Mapping) and all(isinstance(fields, Mapping) for fields in members.values())
    if not fields_of or len(members) < 2:
        raise ConfigError(
            "members must map at least two adapters to their fields, e.g. "
            f"{{'a': {{'learning_rate': 1e-4}}, 'b': {{}}}}, not {members!r:.60}",
            field="members",
        )
    manager.require(*members)
    for name, fields in members.items():
        check_own(fields, _own_fields(objective))
        if name in manager.frozen:
            raise TrainingError(f"{name!r} is frozen: unfreeze it, or leave it out")
    return [Member(name, fields, fields, manager.parameters(name)) for name, fields in members.items()]


def _check_alone(model: nn.Module, group: SideBySide) -> None:
    """Refuses parameters that adapters of a sweep would share."""
    manager = manager_of(model)
    assert manager is not None
    own = {id(parameter) for member in group.members for parameter in member.parameters}
    common = next((name for name, parameter in trainable(model) if id(parameter) not in own), None)
    if common is not None:
        raise TrainingError(
            f"{common} is trainable but in no adapter of the sweep: freeze it, or train without a sweep"
        )
    for name in group.names:
        if manager.base_biases(name):
            raise TrainingError(f"{name!r} trains biases of the base, which adapters share: a sweep needs bias='none'")
        if learns_with_hooks(manager.configs[name]):
            raise TrainingError(f"the method of {name!r} has training hooks, which a sweep does not support")
