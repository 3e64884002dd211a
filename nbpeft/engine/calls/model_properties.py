"""Properties of a model on which its calls depend: its arguments, cache, encoder, labels and gradient checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from nbpeft.engine.changes.called_modules import called_modules

CACHES = ("cache", "past_key_values")
"""Names of the cache argument; the name in newer versions of transformers first."""


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    module_class: Any = type(module)
    return _signature(module_class)


@lru_cache(maxsize=64)
def _signature(module_class: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def cache_argument(module: nn.Module) -> str:
    """Name of a model's argument for cached keys and values; empty if it has no such argument."""
    return next((name for name in CACHES if name in parameters_of(module)), "")


def take_cache(call: dict[str, Any], name: str) -> Any:
    """Removes and returns the cache in the arguments of a call, whichever name it has; None if there is none.

    Args:
        call: the arguments by name; changed in place.
        name: name of the argument, as ``cache_argument`` returns it.
    """
    found = cache_in(call, name)
    for argument in ("past_key_values", name):
        call.pop(argument, None)
    return found


def cache_in(call: Mapping[str, Any], name: str) -> Any:
    """The cache in the arguments of a call, or None; see ``take_cache``."""
    caches = (call.get(argument) for argument in ("past_key_values", name))
    return next((cache for cache in caches if cache is not None), None)


def fills_cache(module: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether a call without a cache creates one; with gradients it does so only if ``use_cache`` is given."""
    use_cache = call.get("use_cache")
    if use_cache is None:
        use_cache = not torch.is_grad_enabled() and getattr(getattr(module, "config", None), "use_cache", False)
    return bool(use_cache)


def has_encoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's class and of its bases, nearest first: a subclass may have any name."""
    return tuple(kind.__name__ for kind in type(model).__mro__)


def is_text_classifier(model: nn.Module) -> bool:
    """Whether a model has labels for each text, not for each token: transformers' ``…ForSequenceClassification``."""
    return any(name.endswith("ForSequenceClassification") for name in class_names(model))


def is_token_classifier(model: nn.Module) -> bool:
    """Whether a model has a label for each token: transformers' ``…ForTokenClassification``."""
    return any(name.endswith("ForTokenClassification") for name in class_names(model))


def part_with_cache(model: nn.Module) -> nn.Module | None:
    """The model itself, or its backbone, whichever takes cached keys and values; None if neither does."""
    backbone = getattr(model, str(getattr(model, "base_model_prefix", "")) or "", None)
    parts = [model, *([backbone] if isinstance(backbone, nn.Module) else [])]
    return next((part for part in parts if cache_argument(part)), None)


def checkpoints_gradients(model: nn.Module) -> bool:
    """Whether gradient checkpointing recomputes layers of a model in backward."""
    return any(module.__dict__.get("gradient_checkpointing", False) for module in called_modules(model))
