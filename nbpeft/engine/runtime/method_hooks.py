"""What a method does in each call of a model and in each step of a training, beside the maths of its layers."""

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
    """Whether a method prepares something for each call of the model."""
    return method_of(config).calls.context is not None


def transforms_calls(config: AdapterConfig) -> bool:
    """Whether a method acts on the arguments of each call of the model."""
    return method_of(config).transforms_calls


def learns_with_hooks(config: AdapterConfig) -> bool:
    """Whether a method takes part in training beside the gradient."""
    return takes_part(config, LearnsWithHooks)


def takes_part(config: AdapterConfig, how: type) -> bool:
    """Whether the adapters of a method, or what they share, are of a class."""
    method = method_of(config)
    return any(issubclass(kind, how) for kind in (method.adapter_class, method.shares.state or object))


def call_arguments(configs: Iterable[AdapterConfig]) -> set[str]:
    """Names of the arguments of a call that are for methods alone, and not for the model."""
    return {name for config in configs for name in method_of(config).calls.arguments}


def generation_arguments(manager: Any) -> dict[str, Any]:
    """What the methods of the active adapters want of ``generate`` where a call does not say otherwise.

    Args:
        manager: of the model.
    """
    configs = [manager.configs[name] for name in manager.active if name in manager.configs] if manager.enabled else []
    return {key: value for one in configs for key, value in method_of(one).calls.generation(one, manager.model).items()}


def call_contexts(
    configs: Mapping[str, AdapterConfig], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what methods prepare for one call of the model.

    Args:
        configs: adapter name -> config of what is active.
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
    """What is active in one call of the model, with what the methods prepare for it.

    Args:
        configs: adapter name -> config, of all on the model.
        active: what is active.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    names = active.names if active.rows is None else active.rows.names
    context = call_contexts({name: configs[name] for name in names if name in configs}, args, kwargs)
    return replace(active, context=context) if context else active


def prepared(
    configs: Mapping[str, AdapterConfig], active: ActiveAdapters, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ActiveAdapters | None:
    """As ``in_call``; None where no method of what is active prepares anything."""
    prepares = any(prepares_calls(configs[name]) for name in active.names if name in configs)
    return in_call(configs, active, args, kwargs) if prepares else None


def hooks_of(layers: Layers, name: str, config: AdapterConfig) -> Iterator[LearnsWithHooks]:
    """Yields what of an adapter takes part in training beside the gradient."""
    if learns_with_hooks(config):
        yield from (one for one in _parts_of(layers, name) if isinstance(one, LearnsWithHooks))


def _parts_of(layers: Layers, name: str) -> Iterator[Any]:
    """Yields what the layers of an adapter share, and the adapter of each layer; None where there is none."""
    yield shared_state_of(layers, name)
    yield from (layer.adapters._modules.get(name) for layer in layers.values())


def hooks_in_training(manager: Any) -> Iterator[tuple[str, LearnsWithHooks]]:
    """Yields, for the adapters that train, their names and what of them takes part beside the gradient.

    Args:
        manager: of the model.
    """
    for name in _in_training(manager):
        for hooked in hooks_of(manager.layers, name, manager.configs[name]):
            yield name, hooked


def _in_training(manager: Any) -> list[str]:
    """The adapters that train."""
    return [name for name in manager.active if name not in manager.frozen] if manager.enabled else []


def extra_loss(manager: Any, loss: Tensor | None = None) -> Tensor | None:
    """The sum of what the adapters that train add to a loss, a scalar; None if that is nothing.

    Args:
        manager: of the model.
        loss: what it has already is left out.
    """
    terms: dict[str, list[Tensor]] = {}
    for name, hooked in hooks_in_training(manager):
        term = hooked.extra_loss()
        if term is not None:
            terms.setdefault(name, []).append(term)
    present = set() if loss is None else terms_in(loss, ((manager, name) for name in terms))
    return marked_sum(manager, {name: found for name, found in terms.items() if (manager, name) not in present})


def extra_loss_of_call(manager: Any, labels: Any, items: Any, *, shifts: bool) -> Tensor | None:
    """What is added to the loss that a call of a model returns; None in the step of a Trainer, which adds it.

    Args:
        manager: of the model.
        labels: of the call.
        items: learned tokens of all batches whose gradients are accumulated, where the call says it.
        shifts: whether the model predicts each label from the tokens before it.
    """
    if current_step(manager) is not None:
        return None
    extra = extra_loss(manager)
    return None if extra is None else extra * share_of_batch(labels, items, shifts=shifts)


def has_training_state(manager: Any) -> bool:
    """Whether a training that is resumed needs more than the tensors in the files of the adapters that train."""
    return any(True for _ in _with_state(manager))


def training_state(manager: Any) -> dict[str, Tensor]:
    """What that is, by name; references."""
    return {
        f"{place}:{key}": tensor for place, one in _with_state(manager) for key, tensor in one.training_state().items()
    }


def set_training_state(manager: Any, state: Mapping[str, Tensor]) -> None:
    """Sets that.

    Args:
        manager: of the model.
        state: what ``training_state`` returned earlier; empty for the start of a training.
    """
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        place, _, name = key.partition(":")
        own.setdefault(place, {})[name] = tensor
    for place, one in _with_state(manager):
        one.set_training_state(own.get(place, {}))


def in_training(
    manager: Any, name: str, config: AdapterConfig, weights: AdapterWeights
) -> tuple[AdapterConfig, AdapterWeights]:
    """What a file of an adapter holds from which its training is resumed.

    Args:
        manager: of the model.
        name: of the adapter.
        config: of the adapter.
        weights: what its file holds otherwise.
    """
    for place, one in _with_state(manager):
        if place.rpartition(".")[0] == name:
            config, weights = one.in_training(config, weights)
    return config, weights


def _with_state(manager: Any) -> Iterator[tuple[str, HasTrainingState]]:
    """Yields what has a state of its own in the adapters that train, each with a name that it alone has."""
    for name in _in_training(manager):
        if takes_part(manager.configs[name], HasTrainingState):
            for number, one in enumerate(_parts_of(manager.layers, name)):
                if isinstance(one, HasTrainingState) and one.has_training_state:
                    yield f"{name}.{number}", one
