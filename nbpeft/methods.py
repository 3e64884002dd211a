"""The names that a package needs to define its own fine-tuning method.

A method consists of a config, whose fields ``%%lora model --method scale`` takes, and an adapter class, which computes
what is added to the weight of one layer. Once they are registered, they work with training, panels, files, merging and
everything else::

    @dataclass
    class ScaleConfig(MethodConfig):
        start: float = 0.0

    @register(ScaleConfig, peft_type="SCALE", label="Scale", sample_configs={"plain": {"start": 0.1}})
    class Scale(Adapter):
        reads_weight = True

        @classmethod
        def parameter_shapes(cls, config, path, module, kind):
            return {"scale_s": (1,)}

        @classmethod
        def initial_tensors(cls, config, site):
            return {"scale_s": site.new(site.shapes["scale_s"]).fill_(config.start)}

        def delta_weight(self, weight, base):
            return weight * self.scale_s

A plain method needs no more; without ``initial_tensors`` its parameters are initialized with zeros. A method that can
compute its output without a tensor of the weight's size overrides ``forward``, and ``from_config`` to store the
settings that its adapters use. ``Adapter`` documents the other methods that can be overridden.
``nbpeft.check_method`` checks a method on small models. A package publishes its methods with an entry point in the
group ``nbpeft.methods``, which names a module whose import registers them.

    MethodConfig, Adapter, register     needed by every method
    AdapterSite, BaseLayer, LayerKind   describe the layer that an adapter is on
    TransformsInput, TransformsOutput, Rescales, Paddable, ServesRows      optional capabilities of adapters
    LearnsWithHooks, HasTrainingState   hooks in the training loop, and state to save with a checkpoint
    SharedTensors, SharedState          tensors that the layers of one adapter share
    CallInputs                          inputs that adapters take from calls of the model
    FileFormat                          files whose tensors differ from the parameters
    Listing                             how lists and panels present the method
    OwnKinds                            layer kinds that it does not support, or supports in its own way
    PeftNames                           the names that PEFT has for the method's tensors and classes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import nbpeft.model  # noqa: F401 - gives configs their file formats
from nbpeft.engine.config.config_checks import check_declared, check_target_fields
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterConfig,
    AdapterSite,
    Paddable,
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
    "Paddable",
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

    A subclass may declare which values are valid: the class attributes ``counts`` (names of fields with a rank or
    another size, from 1), ``shares`` (fields with a dropout or another fraction, from 0 to 1) and ``choices`` (field ->
    its valid values). The types of all values are checked against the annotations.

    Attributes:
        target_modules: names of the layers, a regular expression, or "all-linear"; None for the method's default.
        exclude_modules: names of layers to leave out, or a regular expression.
        modules_to_save: names of modules that are trained as a whole and saved with the adapter.

    Raises:
        ConfigError: a value is invalid.
        UnknownMethodError: the class is not registered.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    checked_apart: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(method_of(self).peft_type)
        check_declared(self)
        check_target_fields(self)
