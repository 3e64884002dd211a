"""Runs the hooks that methods have for calls of the model and for training steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nbpeft.engine.changes.active_state import ActiveAdapters
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.contract.loss_terms import current_step, marked_sum, share_of_batch, terms_in
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.contract.training_hooks import HasTrainingState, LearnsWithHooks
from nbpeft.engine.runtime.adapter_tensors import Layers, shared_state_of


def prepares_calls(config: AdapterConfig) -> bool:
    """Whether a method prepares a context for each call of the model."""
    return method_of(config).calls.context is not None


def transforms_calls(config: AdapterConfig) -> bool:
    """Whether a method transforms the arguments of each call of the model."""
    return method_of(config).transforms_calls


def learns_with_hooks(config: AdapterConfig) -> bool:
    """Whether a method has hooks in training, such as an extra loss or a step after backward."""
    return takes_part(config, LearnsWithHooks)


def takes_part(config: AdapterConfig, how: type) -> bool:
    """Whether a method's adapters, or the state that they share, are instances of a class.

    Args:
        config: a config of the method.
        how: the class.
    """
    method = method_of(config)
    return any(issubclass(kind, how) for kind in (method.adapter_class, method.shares.state or object))


def call_arguments(configs: Iterable[AdapterConfig]) -> set[str]:
    """Names of the arguments of a call that are for methods only and are not passed to the model."""
    return {name for config in configs for name in method_of(config).calls.arguments}


def generation_arguments(manager: Any) -> dict[str, Any]:
    """Default arguments of ``generate`` from the methods of the active adapters."""
    configs = [manager.configs[name] for name in manager.active if name in manager.configs] if manager.enabled else []
    return {
        key: value
        for config in configs
        for key, value in method_of(config).calls.generation(config, manager.model).items()
    }


def call_contexts(
    configs: Mapping[str, AdapterConfig], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the contexts that methods prepare for one call of the model.

    Args:
        configs: adapter name -> config of the active adapters.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        Adapter name -> context, for the adapters whose method prepares one.
    """
    contexts = {}
    for name, config in configs.items():
        prepare = method_of(config).calls.context
        if prepare is not None:
            contexts[name] = prepare(config, args, kwargs)
    return contexts


def in_call(
    configs: Mapping[str, AdapterConfig], active: ActiveAdapters, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ActiveAdapters:
    """The active adapters of one call of the model, with the contexts that their methods prepare for it.

    Args:
        configs: adapter name -> config of all adapters on the model.
        active: the active adapters.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    names = active.call_names
    context = call_contexts({name: configs[name] for name in names if name in configs}, args, kwargs)
    return replace(active, context=context) if context else active


def prepared(
    configs: Mapping[str, AdapterConfig], active: ActiveAdapters, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ActiveAdapters | None:
    """Like ``in_call``; None if no method of an active adapter prepares a context."""
    prepares = any(prepares_calls(configs[name]) for name in active.names if name in configs)
    return in_call(configs, active, args, kwargs) if prepares else None


def hooks_of(layers: Layers, name: str, config: AdapterConfig) -> Iterator[LearnsWithHooks]:
    """Yields the parts of an adapter, its shared state included, that have hooks in training.

    Args:
        layers: path -> adapted layer.
        name: the adapter.
        config: its config.
    """
    if learns_with_hooks(config):
        yield from (part for part in _parts_of(layers, name) if isinstance(part, LearnsWithHooks))


def _parts_of(layers: Layers, name: str) -> Iterator[Any]:
    """Yields the state that an adapter's layers share, then the adapter on each layer; None where it is missing."""
    yield shared_state_of(layers, name)
    yield from (layer.adapters._modules.get(name) for layer in layers.values())


def hooks_in_training(manager: Any) -> Iterator[tuple[str, LearnsWithHooks]]:
    """Yields the name of each adapter that trains, with each part of it that has hooks in training."""
    for name in _in_training(manager):
        for hooked in hooks_of(manager.layers, name, manager.configs[name]):
            yield name, hooked


def _in_training(manager: Any) -> list[str]:
    """The adapters that train."""
    return [name for name in manager.active if name not in manager.frozen] if manager.enabled else []


def extra_loss(manager: Any, loss: Tensor | None = None) -> Tensor | None:
    """The sum of the loss terms of the adapters that train, a scalar; None if they have none.

    Args:
        manager: the model's manager.
        loss: a loss; terms that it already contains are left out.
    """
    terms: dict[str, list[Tensor]] = {}
    for name, hooked in hooks_in_training(manager):
        term = hooked.extra_loss()
        if term is not None:
            terms.setdefault(name, []).append(term)
    present = set() if loss is None else terms_in(loss, ((manager, name) for name in terms))
    return marked_sum(manager, {name: tensors for name, tensors in terms.items() if (manager, name) not in present})


def extra_loss_of_call(manager: Any, labels: Any, items: Any, *, shifts: bool) -> Tensor | None:
    """The loss terms to add to the loss that a call of a model returns; None in a Trainer's step, which adds them.

    Args:
        manager: the model's manager.
        labels: the labels of the call.
        items: number of labelled tokens in all batches whose gradients are accumulated (``num_items_in_batch``),
            if the call has it.
        shifts: whether the model predicts each label from the tokens before it.
    """
    if current_step(manager) is not None:
        return None
    extra = extra_loss(manager)
    return None if extra is None else extra * share_of_batch(labels, items, shifts=shifts)


def has_training_state(manager: Any) -> bool:
    """Whether resuming a training needs state in addition to the tensors in the adapters' files."""
    return any(True for _ in _with_state(manager))


def training_state(manager: Any) -> dict[str, Tensor]:
    """References to the state, by name, that resuming a training needs in addition to the adapters' files."""
    return {
        f"{place}:{key}": tensor
        for place, part in _with_state(manager)
        for key, tensor in part.training_state().items()
    }


def set_training_state(manager: Any, state: Mapping[str, Tensor]) -> None:
    """Sets the state of ``training_state``.

    Args:
        manager: the model's manager.
        state: an earlier result of ``training_state``; empty at the start of training.
    """
    by_place: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        place, _, name = key.partition(":")
        by_place.setdefault(place, {})[name] = tensor
    for place, part in _with_state(manager):
        part.set_training_state(by_place.get(place, {}))


def in_training(
    manager: Any, name: str, config: AdapterConfig, weights: AdapterWeights
) -> tuple[AdapterConfig, AdapterWeights]:
    """The config and tensors that an adapter's file must contain so that training can be resumed.

    Args:
        manager: the model's manager.
        name: the adapter.
        config: its config.
        weights: the tensors that its file contains otherwise.
    """
    for place, part in _with_state(manager):
        if place.rpartition(".")[0] == name:
            config, weights = part.in_training(config, weights)
    return config, weights


def _with_state(manager: Any) -> Iterator[tuple[str, HasTrainingState]]:
    """Yields the parts with training state of the adapters that train, each under a unique name."""
    for name in _in_training(manager):
        if takes_part(manager.configs[name], HasTrainingState):
            for number, part in enumerate(_parts_of(manager.layers, name)):
                if isinstance(part, HasTrainingState) and part.has_training_state:
                    yield f"{name}.{number}", part
