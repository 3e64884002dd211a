"""What a parameter-efficient method of one's own is made of.

A method is a config, whose fields are what ``%%lora model --method scale`` takes, and an adapter, which says what it
adds to the weight of one layer. Once they are registered, training, panels, files, merging and everything else work
with them::

    @dataclass
    class ScaleConfig(MethodConfig):
        start: float = 0.0

    @register(ScaleConfig, peft_type="SCALE", label="Scale", sample_configs={"plain": {"start": 0.1}})
    class Scale(Adapter):
        @classmethod
        def parameter_shapes(cls, config, path, module, kind):
            return {"scale_s": (kind.features(module)[1], 1)}

        @classmethod
        def initial_tensors(cls, config, site):
            return {"scale_s": site.new(site.shapes["scale_s"]).fill_(config.start)}

        def delta_weight(self, weight, base):
            return weight * self.scale_s

That is all that a plain method needs; without ``initial_tensors`` its parameters start at zeros. A method that computes
what it adds to the output without a tensor of the weight's size overrides ``forward``, and names in ``from_config`` the
settings that its adapters use. ``Adapter`` says what else a method can override. A package makes its methods known by
an entry point in the group ``nbpeft.methods``, which names a module whose import registers them.

    MethodConfig, Adapter, register     what every method needs
    AdapterSite, BaseLayer, LayerKind   what a method knows of a layer
    TransformsInput, TransformsOutput, Rescales, Pads, ServesRows      what some can do in addition
    LearnsWithHooks, HasTrainingState   taking part in training besides the gradient, and remembering it
    SharedTensors, SharedState          tensors that layers of one adapter share
    CallInputs                          what adapters take from calls of the model
    FileFormat                          files that differ from the parameters
    Listing                             how lists and panels present it
    OwnKinds                            kinds of layers that it does not support, or supports in its own way
    PeftNames                           what users of PEFT find under names of PEFT's
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import nbpeft.model  # noqa: F401 - gives configs the files they are saved in
from nbpeft.engine.config.config_checks import check_target_fields
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterConfig,
    AdapterSite,
    Pads,
    PeftType,
    Rescales,
    ServesRows,
    SharedState,
    TransformsInput,
    TransformsOutput,
)
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.method_records import CallInputs, FileFormat, Listing, OwnKinds, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import method_of, register
from nbpeft.engine.contract.training_hooks import HasTrainingState, LearnsWithHooks

__all__ = [
    "Adapter",
    "AdapterSite",
    "BaseLayer",
    "CallInputs",
    "FileFormat",
    "HasTrainingState",
    "LayerKind",
    "LearnsWithHooks",
    "Listing",
    "MethodConfig",
    "OwnKinds",
    "Pads",
    "PeftNames",
    "Rescales",
    "ServesRows",
    "SharedState",
    "SharedTensors",
    "TransformsInput",
    "TransformsOutput",
    "register",
]


@dataclass
class MethodConfig(AdapterConfig):
    """Base class of the configs: a dataclass whose fields all have defaults.

    Attributes:
        target_modules: names of the layers, a pattern, or "all-linear"; the method's default if left out.
        exclude_modules: names or a pattern of layers to leave out.
        modules_to_save: modules trained as a whole.

    Raises:
        ConfigError: a value is impossible.
        UnknownMethodError: the class is not registered.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    checked_apart: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(method_of(self).peft_type)
        check_target_fields(self)
