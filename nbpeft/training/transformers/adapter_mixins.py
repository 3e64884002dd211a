"""Methods of other libraries that import PEFT when they are called, for models and configs of nbpeft.

``model.add_adapter(config)`` of transformers is one. With a config of nbpeft it runs with nbpeft's names instead of
PEFT's, and so do the methods that activate, read and delete the adapters of such a model, and those of
TRL's Trainers. diffusers uses PEFT in many other places as well: there an error says what to do.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import NbpeftError, NotSupportedError

_ROOT = __name__.partition(".")[0]


def is_adapted(value: Any) -> bool:
    """Whether a value is a model with adapters of nbpeft."""
    return manager_of(value) is not None


def methods_with_imports(owner: type, is_ours: Callable[[Any], bool]) -> dict[str, Callable[..., Any]]:
    """Methods of a class that import from PEFT when they are called, changed to import from nbpeft.

    Args:
        owner: the class.
        is_ours: whether an argument, including ``self``, belongs to nbpeft; nbpeft's configs always do.

    Returns:
        Name of a method -> the changed method.
    """
    return {
        name: importing(method, is_ours)
        for name, method in vars(owner).items()
        if isinstance(method, FunctionType)
        and any(imported.partition(".")[0] == "peft" for imported in method.__code__.co_names)
    }


def importing(method: FunctionType, is_ours: Callable[[Any], bool]) -> Callable[..., Any]:
    """Wraps a method so that it imports from nbpeft if an argument belongs to nbpeft."""

    @functools.wraps(method)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        ours = any(isinstance(value, AdapterConfig) or is_ours(value) for value in (*args, *kwargs.values()))
        return (_on_nbpeft(method) if ours else method)(*args, **kwargs)

    return replaced


def _on_nbpeft(function: FunctionType) -> FunctionType:
    """A copy of a function whose imports from ``peft`` come from nbpeft, and which does not need PEFT installed."""
    names = {**function.__globals__, "check_peft_version": lambda *args, **kwargs: None}
    names["__builtins__"] = {**vars(builtins), "__import__": _import}
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: tuple[str, ...] = (),
    level: int = 0,
) -> ModuleType:
    first, dot, rest = name.partition(".")
    ours = f"{_ROOT}{dot}{rest}" if first == "peft" and not level else name
    return builtins.__import__(ours, globals, locals, fromlist, level)


def explaining(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``add_adapter`` of diffusers so that its error for a config of nbpeft says what to do."""

    @functools.wraps(method)
    def add_adapter(self: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, adapter_config, *args, **kwargs)
        except NbpeftError:
            raise
        except (ImportError, TypeError, ValueError) as error:
            theirs = getattr(sys.modules.get("peft"), "PeftConfig", ())
            if not isinstance(adapter_config, AdapterConfig) or isinstance(adapter_config, theirs):
                raise  # about another argument: diffusers takes such a config
            raise NotSupportedError(
                "diffusers supports only adapters of the package peft: call nbpeft.install_as_peft() in a new process, "
                "before anything imports peft or diffusers"
            ) from error

    return add_adapter
