"""Gradient checkpointing under the names that the installed transformers has for it (5.24 renamed it)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

_NAMES = ("activation_checkpointing", "gradient_checkpointing")
"""New and old name; transformers 6 removes the old one."""


def is_checkpointing(model: object) -> bool:
    """Return whether a model keeps layer inputs only and recomputes the rest in backward."""
    names = (f"is_{name}" for name in _NAMES)
    return bool(next((getattr(model, name) for name in names if hasattr(type(model), name)), False))


def enable_checkpointing(model: object, options: Mapping[str, Any] | None = None) -> None:
    """Switch it on, not reentrant by default.

    Args:
        model: a model of transformers.
        options: keywords of ``torch.utils.checkpoint``; ignored where the model's method takes none.

    Raises:
        AttributeError: the model has no such method.
    """
    name, enable = _method(model, "enable")
    takes = f"{name}_kwargs" in inspect.signature(enable).parameters
    enable(**({f"{name}_kwargs": {"use_reentrant": False} | dict(options or {})} if takes else {}))


def disable_checkpointing(model: object) -> None:
    """Switch it off.

    Raises:
        AttributeError: the model has no such method.
    """
    _method(model, "disable")[1]()


def _method(model: object, ending: str) -> tuple[str, Callable[..., Any]]:
    name = next((name for name in _NAMES if hasattr(model, f"{name}_{ending}")), _NAMES[-1])
    return name, getattr(model, f"{name}_{ending}")
