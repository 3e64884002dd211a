"""Gradient checkpointing under the names of the installed transformers (5.24 renamed its methods)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_NAMES = ("activation_checkpointing", "gradient_checkpointing")
"""New and old name; transformers 6 will remove the old one."""


def is_checkpointing(model: object) -> bool:
    """Return whether gradient checkpointing is enabled on a model."""
    names = (f"is_{name}" for name in _NAMES)
    return bool(next((getattr(model, name) for name in names if hasattr(type(model), name)), False))


def enable_checkpointing(model: object, options: Mapping[str, Any] | None = None) -> None:
    """Enable gradient checkpointing, by default with ``use_reentrant=False``.

    Args:
        model: a transformers model.
        options: keyword arguments of ``torch.utils.checkpoint``; ignored if the model's method takes none.

    Raises:
        AttributeError: the model has no such method.
    """
    name, enable = _method(model, "enable")
    takes = f"{name}_kwargs" in inspect.signature(enable).parameters
    enable(**({f"{name}_kwargs": {"use_reentrant": False} | dict(options or {})} if takes else {}))


def disable_checkpointing(model: object) -> None:
    """Disable gradient checkpointing.

    Raises:
        AttributeError: the model has no such method.
    """
    _method(model, "disable")[1]()


def _method(model: object, ending: str) -> tuple[str, Callable[..., Any]]:
    name = next((name for name in _NAMES if hasattr(model, f"{name}_{ending}")), _NAMES[-1])
    return name, getattr(model, f"{name}_{ending}")
