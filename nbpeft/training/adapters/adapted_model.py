"""Questions that training has about a model with adapters, whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbpeft.engine.contract.registry import methods
from nbpeft.engine.runtime.method_hooks import call_arguments
from nbpeft.engine.tree.model_tree import manager_of


def is_adapted(model: Any) -> bool:
    """Whether ``model`` carries named adapters and can save them apart from its base."""
    return isinstance(getattr(model, "peft_config", None), dict) and callable(getattr(model, "get_base_model", None))


def base_of(model: Any) -> nn.Module:
    """The base model below the adapters, or ``model`` itself."""
    base: nn.Module = model.get_base_model() if is_adapted(model) else model
    return base


def active_names(model: Any) -> tuple[str, ...]:
    """Names of the active adapters; empty for a model without."""
    if not is_adapted(model):
        return ()
    names = model.active_adapters
    return tuple(names() if callable(names) else names)


def trained_names(model: Any) -> tuple[str, ...]:
    """Names of the active adapters that train; all active ones where none does."""
    names = active_names(model)
    frozen = getattr(manager_of(model), "frozen", ())
    return tuple(name for name in names if name not in frozen) or names


def call_columns(model: Any) -> tuple[str, ...]:
    """Columns of rows that the methods of a model's adapters take from each call, beside those that the base takes."""
    return tuple(sorted(call_arguments(getattr(manager_of(model), "configs", {}).values())))


def main_dtype(base: nn.Module) -> torch.dtype:
    """The dtype of the largest floating parameter."""
    floats = [parameter for parameter in base.parameters() if parameter.is_floating_point()]
    return max(floats, key=lambda parameter: parameter.numel()).dtype if floats else torch.float32


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that is trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def module_path(parameter_name: str) -> str:
    """The module of the base model that a trained parameter belongs to, without wrappers."""
    path = parameter_name.removeprefix("base_model.model.")
    parts = dict.fromkeys(f".{method.adapter_class.peft.shown_as}." for method in methods())
    for mark in (*parts, ".modules_to_save.", *(f".{method.prefix}" for method in methods())):
        if mark in path:
            return path.split(mark)[0]
    return path.rpartition(".")[0] or path
