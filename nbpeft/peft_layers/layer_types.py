"""Classes of adapted layers that are called as in PEFT: ``type(layer).__name__`` is ``Linear`` or ``Linear4bit``.

As in PEFT, the class of a layer is that of its first adapter's method, and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from nbpeft.engine.contract.adapter import Adapter
from nbpeft.engine.contract.base import Backend, LayerKind
from nbpeft.engine.contract.registry import Method, method_of_class
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.composite_layer import AdaptedComposite
from nbpeft.engine.wrappers.extension import title_wrappers
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.parameter_layer import AdaptedParameter

_chosen: dict[tuple[type[Any], type[Adapter], LayerKind | None, Backend | None], type[Any]] = {}
_BASES = {base.__name__: base for base in (AdaptedLayer, AdaptedParameter, AdaptedComposite, AdaptedBlock)}


def title_of(methods: Sequence[Method], kind: LayerKind, backend: Backend) -> str:
    """Returns PEFT's package and class of a layer with adapters: ``lora.Linear``, ``ia3.Linear4bit``.

    Args:
        methods: the methods of the adapters.
        kind: kind of the layer.
        backend: its backend.
    """
    own = sorted({method.peft_type.lower() for method in methods if not method.peft.layer})
    layer = backend.peft_name or kind.peft_name
    prefix = methods[0].peft.layer_prefix if len(own) == 1 else ""
    return f"{'/'.join(own)}.{prefix}{layer}" if own or not methods else methods[0].peft.layer


def _titled(cls: type[Any], adapter: type[Adapter], kind: LayerKind | None, backend: Backend | None) -> type[Any]:
    found = _chosen.get((cls, adapter, kind, backend))
    if found is None:
        found, method = cls, method_of_class(adapter)
        if method is not None:
            title = method.peft.layer if kind is None or backend is None else title_of([method], kind, backend)
            found = _type_called(cls.__name__, title) if title else cls
        _chosen[cls, adapter, kind, backend] = found
    return found


@cache
def _type_called(base: str, title: str) -> type[Any]:
    """Returns a class of wrappers; the same class each time."""
    names = {"__module__": __name__, "__qualname__": f"{base}:{title.replace('.', ':')}"}
    return type(title.rpartition(".")[2], (_BASES[base],), {"__doc__": _BASES[base].__doc__, **names})


def __getattr__(name: str) -> Any:
    """Finds a class by its qualified name, which pickles contain."""
    base, _, title = name.partition(":")
    if base not in _BASES or not title:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _type_called(base, title.replace(":", "."))


title_wrappers(_titled)
