"""PEFT's classes of layers, wrappers, tuners and statuses under its names, for ``isinstance``."""

from __future__ import annotations

from functools import cache
from typing import Any

from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.peft_layer_api import layer_type
from nbpeft.engine.registry import methods_of_type
from nbpeft.model.peft_model import PeftModel
from nbpeft.model.status import LayerStatus, ModelStatus
from nbpeft.model.tuner import BaseTuner as BaseTuner
from nbpeft.model.tuner import tuner_class

IA3Model = tuner_class(methods_of_type("IA3")[0])
TrainableTokensModel = tuner_class(methods_of_type("TRAINABLE_TOKENS")[0])
PeftMixedModel = PeftModel
"""The same: adapters of different methods go together on every model here."""
BaseTunerLayer = AdaptedLayer
TunerLayerStatus = LayerStatus
TunerModelStatus = ModelStatus
AuxiliaryTrainingWrapper = ModulesToSaveWrapper
IA3Layer = layer_type("IA3", "IA3Layer")
TrainableTokensLayer = layer_type("TRAINABLE_TOKENS", "TrainableTokensLayer")
TrainableTokensWrapper = layer_type("TRAINABLE_TOKENS", "TrainableTokensWrapper")
"""The same: rows that a LoRA config asks for are an adapter of their own here."""


@cache
def layer_class(title: str) -> type[Any]:
    """The class of adapted layers that PEFT calls by a title: the same object each time.

    Args:
        title: method and kind, such as ``lora.Linear``.
    """
    doc = f"Adapted layers that PEFT calls {title}; for ``isinstance`` only."
    return _TitledLayer(title.rpartition(".")[2], (), {"title": title, "__doc__": doc})


class _TitledLayer(type):
    """The type of such classes."""

    title: str

    def __instancecheck__(cls, layer: object) -> bool:
        return isinstance(layer, AdaptedLayer) and layer.adapted_as == cls.title
