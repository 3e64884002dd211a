"""PEFT's layer classes, for ``isinstance`` checks of adapted layers."""

from __future__ import annotations

from functools import partial
from inspect import Signature, signature
from typing import Any, NoReturn

from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import CheckpointError
from nbpeft.peft_layers.replaced import note, own_forward


class LayerType(type):
    """Metaclass of PEFT's layer classes: ``isinstance(adapted_layer, cls)`` is true, although they are not related.

    A class selects layers either by the ``peft_type`` of their adapters or by their ``title``, PEFT's name of the
    layer's class. A class that derives from it, for custom layers, has only its own instances.
    """

    def __instancecheck__(cls, layer: object) -> bool:
        if type.__instancecheck__(cls, layer):
            return True
        if not isinstance(layer, AdaptedLayer | AdaptedBlock):
            return False
        if type.__instancecheck__(cls, layer.__dict__.get("custom")):
            return True
        own = vars(cls)
        if "title" in own:
            return bool(layer.adapted_as == own["title"])
        return "peft_type" in own and any(method.peft_type == own["peft_type"] for method in layer._methods())

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Creates an instance, or the engine's layer if the class has a ``_build`` of its own that returns one."""
        build = vars(cls).get("_build")
        built = None if build is None else build(*args, **kwargs)
        return super().__call__(*args, **kwargs) if built is None else built

    @property
    def __signature__(cls) -> Signature:
        """The arguments of the class, which ``inspect`` would otherwise take from ``__call__``."""
        build = vars(cls).get("_build")
        if isinstance(build, partial):
            return signature(build)
        own = signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=[*own.parameters.values()][1:])

    def __setattr__(cls, name: str, value: object) -> None:
        before = vars(cls).get(name)
        super().__setattr__(name, value)
        cls._note(name, value, before)

    def __delattr__(cls, name: str) -> None:
        before = vars(cls).get(name)
        super().__delattr__(name)
        cls._note(name, None, before)

    def _note(cls, name: str, value: object, before: object) -> None:
        if not name.startswith("__") and {"title", "peft_type"} & vars(cls).keys():  # not on a class of the user's own
            note(cls, name, value, before)


def layer_type(peft_type: str, name: str, **attributes: Any) -> type[Any]:
    """Creates a class like PEFT's ``LoraLayer`` for ``isinstance`` checks of layers with a method's adapters.

    Args:
        peft_type: the method's PEFT type.
        name: name of the class.
        **attributes: attributes of the class.
    """
    doc = f"Adapted layers with adapters of type {peft_type}; for ``isinstance`` only."
    own = {"peft_type": peft_type, "__doc__": doc, "__setstate__": refuse_pickle_of_peft}
    return LayerType(name, (), own | attributes)


def class_with_title(title: str, **attributes: Any) -> type[Any]:
    """Creates a class like PEFT's ``lora.Linear`` for ``isinstance`` checks of adapted layers.

    Args:
        title: package and class in PEFT.
        **attributes: attributes of the class.
    """
    doc = f"Adapted layers that PEFT calls {title}; for ``isinstance`` and to replace their ``forward``."
    own = {"title": title, "__doc__": doc, "__setstate__": refuse_pickle_of_peft, "forward": own_forward}
    return LayerType(title.rpartition(".")[2], (), own | attributes)


def refuse_pickle_of_peft(module: object, state: object) -> NoReturn:
    """``__setstate__`` of classes under PEFT's import names: refuses modules that were pickled by PEFT.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"a {type(module).__name__} in this file was pickled by PEFT, and nbpeft cannot run PEFT's modules: load the "
        "file with PEFT, save the adapter with save_pretrained(), and load that folder"
    )
