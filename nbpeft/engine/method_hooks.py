"""What a method does in each call of a model and in each step of a training, beside the maths of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nbpeft.engine.active_state import Active
from nbpeft.engine.adapter import AdapterConfig, LearnsWithHooks
from nbpeft.engine.adapter_tensors import Layers, shared_state_of
from nbpeft.engine.registry import method_of


def prepares_calls(config: AdapterConfig) -> bool:
    """Whether a method prepares something for each call of the model."""
    return method_of(config).call_context is not None


def transforms_calls(config: AdapterConfig) -> bool:
    """Whether a method acts on the arguments of each call of the model."""
    return method_of(config).transforms_calls


def learns_with_hooks(config: AdapterConfig) -> bool:
    """Whether a method takes part in training beside the gradient."""
    method = method_of(config)
    return any(issubclass(kind, LearnsWithHooks) for kind in (method.adapter_class, method.shared or object))


def call_arguments(configs: Iterable[AdapterConfig]) -> set[str]:
    """Names of the arguments of a call that are for methods alone, and not for the model."""
    return {name for config in configs for name in method_of(config).call_arguments}


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
        prepare = method_of(config).call_context
        if prepare is not None:
            contexts[name] = prepare(config, args, kwargs)
    return contexts


def in_call(
    configs: Mapping[str, AdapterConfig], active: Active, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Active:
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
    configs: Mapping[str, AdapterConfig], active: Active, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Active | None:
    """As ``in_call``; None where no method of what is active prepares anything."""
    prepares = any(prepares_calls(configs[name]) for name in active.names if name in configs)
    return in_call(configs, active, args, kwargs) if prepares else None


def hooks_of(layers: Layers, name: str, config: AdapterConfig) -> Iterator[LearnsWithHooks]:
    """Yields what of an adapter takes part in training beside the gradient."""
    if not learns_with_hooks(config):
        return
    found: list[Any] = [shared_state_of(layers, name)]
    found += [layer.adapters._modules.get(name) for layer in layers.values()]
    yield from (one for one in found if isinstance(one, LearnsWithHooks))
