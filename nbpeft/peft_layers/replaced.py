"""What scripts put on PEFT's layer classes: a ``forward`` is called, and what nothing calls is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import PeftWarning

_own_forward: Callable[..., Tensor] = AdaptedLayer.forward
_before: dict[type, Any] = {}
"""Class -> its ``forward`` before the first replacement."""
_replaced: dict[type, Callable[..., Any]] = {}
"""Class for ``isinstance`` -> the ``forward`` that a script put on it."""


def own_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of PEFT's layer classes: what an adapted layer computes, whatever scripts put on its class."""
    return _own_forward(layer, x, *args, **kwargs)


def note(cls: type, name: str, value: object, before: object) -> None:
    """Uses an attribute that a script put on a class, or warns that it has no effect.

    Args:
        cls: a class of PEFT's layers.
        name: the attribute.
        value: its value; None if it was deleted.
        before: its previous value, None if there was none.
    """
    if name != "forward" or "title" not in vars(cls):  # in PEFT, only these classes have a forward
        if callable(value) or isinstance(value, property | staticmethod | classmethod):
            warnings.warn(
                f"{cls.__name__}.{name} is replaced for layer classes of your own (config._register_custom_module) "
                "alone: the layers that nbpeft adapts do not call it",
                PeftWarning,
                stacklevel=3,
            )
        return
    original = _before.setdefault(cls, before)
    if callable(value) and value is not original:
        _replaced[cls] = value
    else:
        _replaced.pop(cls, None)
    AdaptedLayer.forward = _forward if _replaced else _own_forward  # type: ignore[method-assign]


def _forward(self: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    for cls, function in _replaced.items():
        if isinstance(self, cls):
            return function(self, x, *args, **kwargs)
    return _own_forward(self, x, *args, **kwargs)
