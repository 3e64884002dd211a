"""Classes of adapted layers that are called as in PEFT: ``type(layer).__name__`` is ``Linear`` or ``Linear4bit``.

As in PEFT, the class of a layer is that of its first adapter's method, and stays.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.composite_layer import AdaptedComposite
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter

_BASES = {base.__name__: base for base in (AdaptedLayer, AdaptedParameter, AdaptedComposite, AdaptedBlock)}


@cache
def layer_type_called(base: type[Any], title: str) -> type[Any]:
    """Returns a class of wrappers; the same class each time.

    Args:
        base: class of the engine that it derives from.
        title: package and class in PEFT, such as ``lora.Linear``.
    """
    names = {"__module__": __name__, "__qualname__": f"{base.__name__}:{title.replace('.', ':')}"}
    return type(title.rpartition(".")[2], (base,), {"__doc__": f"{base.__doc__}", **names})


def __getattr__(name: str) -> Any:
    """Finds a class by its qualified name, which pickles contain."""
    base, _, title = name.partition(":")
    if base not in _BASES or not title:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return layer_type_called(_BASES[base], title.replace(":", "."))
