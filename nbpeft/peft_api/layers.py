"""PEFT's classes of layers, wrappers, tuners and statuses, for ``isinstance``."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from nbpeft.engine.config.default_targets import default_targets_of
from nbpeft.engine.contract.model_adapter import ModelAdapter
from nbpeft.engine.contract.registry import backends, layer_kinds, methods_of_type
from nbpeft.engine.methods.lora.variants.xlora_classifier import XLoraClassifier as XLoraClassifier
from nbpeft.engine.methods.products.poly import PolyRouter as PolyRouter
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.handle.status import TunerLayerStatus as TunerLayerStatus
from nbpeft.model.handle.status import TunerModelStatus as TunerModelStatus
from nbpeft.model.handle.tuner import BaseTuner as BaseTuner
from nbpeft.model.handle.tuner import tuner_class
from nbpeft.peft_layers.classes import class_with_title, layer_type
from nbpeft.peft_layers.lora_layers import Linear
from nbpeft.peft_layers.single_layers import lora_layer, lora_parameter

IA3Model = tuner_class(methods_of_type("IA3")[0])
TrainableTokensModel = tuner_class(methods_of_type("TRAINABLE_TOKENS")[0])
PeftMixedModel = PeftModel
"""The same class, because every model of nbpeft supports adapters of different methods."""
BaseTunerLayer = AdaptedLayer
BasePromptEncoder = ModelAdapter
AuxiliaryTrainingWrapper = ModulesToSaveWrapper


def _names_in_layers(peft_type: str) -> dict[str, tuple[str, ...]]:
    """Returns a method's ``adapter_layer_names`` and ``other_param_names``, as PEFT's layer classes have them."""
    method = next(iter(methods_of_type(peft_type)), None)
    if method is None:
        return {}
    parameters, others = method.peft.parameters.split(), method.peft.others.split()
    return {"adapter_layer_names": tuple(parameters), "other_param_names": tuple(others)}


@cache
def _layer_type(peft_type: str, name: str) -> type[Any]:
    """Returns the class of layers with adapters of a method; the same class each time."""
    return layer_type(peft_type, name, **_names_in_layers(peft_type))


IA3Layer = _layer_type("IA3", "IA3Layer")
TrainableTokensLayer = _layer_type("TRAINABLE_TOKENS", "TrainableTokensLayer")
TrainableTokensWrapper = layer_type(
    "TRAINABLE_TOKENS",
    "TrainableTokensWrapper",
    **{
        kind: tuple(f"token_adapter.{name}" for name in names)
        for kind, names in _names_in_layers("TRAINABLE_TOKENS").items()
    },
)
"""Not a separate wrapper here: ``trainable_token_indices`` of a LoRA config add a second adapter to the embedding."""


@cache
def layer_class(title: str) -> type[Any]:
    """Returns the class for ``isinstance`` checks of adapted layers; the same class each time.

    Args:
        title: package and class in PEFT, such as ``lora.Linear``.
    """
    if title == Linear.title:
        return Linear
    attributes: dict[str, Any] = dict(_names_in_layers(title.partition(".")[0].upper()))
    if title.startswith("lora."):
        attributes["__doc__"] = f"Adapted layers that PEFT calls {title}; calling it adapts a single layer."
        attributes["_build"] = partial(lora_parameter if title == "lora.ParamWrapper" else lora_layer, title)
    return class_with_title(title, **attributes)


def of_method(package: str, name: str) -> Any:
    """Returns the value of a name in PEFT's package of a method: its model, its layers, its default targets.

    Args:
        package: package in ``peft.tuners``, such as ``loha``.
        name: such as ``LoHaModel``, ``LoHaLayer`` or ``Linear``.

    Returns:
        The value; None if no such method is registered, or if its package has no such name.
    """
    method = next(iter(methods_of_type(package.upper())), None)
    if method is None:
        return None
    title = method.config_class.__name__.removesuffix("Config")
    if name == f"{title}Model":
        return tuner_class(method)
    if name == f"{title}Layer" and not method.transforms_calls:
        return _layer_type(method.peft_type, name)
    if name.isupper():
        return default_targets_of(method.peft_type)
    own = name.removeprefix(title).removeprefix(method.peft.layer_prefix)
    known = {kind.peft_name for kind in layer_kinds()} | {backend.peft_name for backend in backends()}
    return layer_class(f"{package}.{method.peft.layer_prefix}{own}") if own in known else None
