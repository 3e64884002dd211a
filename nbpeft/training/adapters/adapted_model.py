"""Facts about a model with adapters that a training needs, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nbpeft.engine.contract.registry import methods
from nbpeft.engine.runtime.method_hooks import call_arguments
from nbpeft.engine.tree.model_tree import manager_of

PREPARED = "_is_accelerate_prepared"
"""The mark that accelerate leaves on a model: it neither casts nor wraps a model that has it."""


def is_adapted(model: Any) -> bool:
    """Whether a model has named adapters, of nbpeft or PEFT, that can be saved separately from its base."""
    return isinstance(getattr(model, "peft_config", None), dict) and callable(getattr(model, "get_base_model", None))


def base_of(model: Any) -> nn.Module:
    """The base model of an adapted model, or ``model`` itself."""
    base: nn.Module = model.get_base_model() if is_adapted(model) else model
    return base


def active_names(model: Any) -> tuple[str, ...]:
    """The names of the active adapters; empty for a model without adapters."""
    if not is_adapted(model):
        return ()
    names = model.active_adapters
    return tuple(names() if callable(names) else names)


def trained_names(model: Any) -> tuple[str, ...]:
    """The names of the active adapters that are not frozen; if all are frozen, of all active ones."""
    names = active_names(model)
    frozen = getattr(manager_of(model), "frozen", ())
    return tuple(name for name in names if name not in frozen) or names


def call_columns(model: Any) -> tuple[str, ...]:
    """The columns of rows that the methods of a model's adapters take in addition to those of the base model."""
    return tuple(sorted(call_arguments(getattr(manager_of(model), "configs", {}).values())))


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and parameters that require gradients."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def module_path(parameter_name: str) -> str:
    """The path of the base model's module to which a trained parameter belongs, without wrappers."""
    path = parameter_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    parts = dict.fromkeys(f".{method.adapter_class.peft.shown_as}." for method in methods())
    for mark in (*parts, ".modules_to_save.", *(f".{method.prefix}" for method in methods())):
        if mark in path:
            return path.split(mark)[0]
    return path.rpartition(".")[0] or path
