"""The config of X-LoRA, and the adapters it names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from nbpeft.engine.calls.model_properties import has_encoder
from nbpeft.engine.config.config_checks import check_count, check_declared
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType, ReadsTensors, store_of
from nbpeft.engine.contract.base import Shape
from nbpeft.engine.contract.registry import layer_kind_named
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.lora import LoRA
from nbpeft.errors import ConfigError, few, shown


class Expert:
    """One of the adapters of an X-LoRA: a saved LoRA.

    Attributes:
        name: its name in the config.
        source: a folder or a hub id.
        config: its config.
        shapes: path of each adapted layer -> parameter -> shape.
    """

    def __init__(self, name: str, source: str, config: LoraConfig, shapes: Mapping[str, Mapping[str, Shape]]) -> None:
        self.name, self.source, self.config, self.shapes = name, source, config, shapes
        self.reads: ReadsTensors | None = None

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Path -> parameter -> tensor, read from its file.

        Raises:
            CheckpointError: tensors are missing, or have other shapes.
        """
        assert self.reads is not None
        return self.reads(self.shapes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "reads": None}


@dataclass
class XLoraConfig(AdapterConfig):
    """Config of X-LoRA. Field names and defaults are PEFT's.

    Attributes:
        hidden_size: features of the model's last hidden states; taken from the model if left out.
        adapters: name -> folder or hub id of each LoRA, in the order of their weights.
        enable_softmax: apply a softmax to the weights of a token; else use the classifier's output.
        enable_softmax_topk: a softmax over the top_k_lora largest weights only; then turn enable_softmax off.
        layerwise_scalings: predict weights for each layer; else the same for all.
        xlora_depth: linear layers of the classifier.
        xlora_size: features between them.
        xlora_dropout_p: dropout between them.
        use_trainable_adapters: train the adapters, too, and save them with the classifier.
        softmax_temperature: the classifier's output is divided by it; smaller values give a sharper softmax.
        top_k_lora: number of adapters that a token uses; None for all.
        scaling_pass_value: weight of each adapter in the first pass, whose hidden states the classifier reads.
        global_scaling_weight: factor on the sum of the deltas.

    Raises:
        ConfigError: a value is invalid.
    """

    hidden_size: int | None = field(default=None)
    adapters: dict[str, str] | None = field(default=None)
    enable_softmax: bool = field(default=True)
    enable_softmax_topk: bool = field(default=False)
    layerwise_scalings: bool = field(default=False)
    xlora_depth: int = field(default=1)
    xlora_size: int = field(default=2048)
    xlora_dropout_p: float = field(default=0.2)
    use_trainable_adapters: bool = field(default=False)
    softmax_temperature: float = field(default=1.0)
    top_k_lora: int | None = field(default=None)
    scaling_pass_value: float = field(default=0.0)
    global_scaling_weight: float = field(default=1.0)

    counts: ClassVar[tuple[str, ...]] = ("hidden_size", "xlora_depth", "xlora_size", "top_k_lora")
    shares: ClassVar[tuple[str, ...]] = ("xlora_dropout_p",)
    positive: ClassVar[tuple[str, ...]] = ("softmax_temperature",)
    value_fields: ClassVar[tuple[str, ...]] = (
        *("enable_softmax", "enable_softmax_topk", "xlora_dropout_p", "softmax_temperature", "top_k_lora"),
        *("scaling_pass_value", "global_scaling_weight"),
    )
    condenses_targets: ClassVar[bool] = False
    experts: ClassVar[tuple[Expert, ...]] = ()
    """The adapters, once they are read; ``target_modules`` are then the paths of their layers."""

    def __post_init__(self) -> None:
        if isinstance(self.adapters, Mapping):
            self.adapters = {
                name: os.fspath(source) if isinstance(source, os.PathLike) else source
                for name, source in self.adapters.items()
            }
        super().__post_init__()
        self.peft_type = PeftType("XLORA")
        self.adapters = {} if self.adapters is None else self.adapters
        check_declared(self)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "`enable_softmax_topk` and `enable_softmax` are both enabled: the weights go through two softmaxes, "
                "which makes them nearly equal; set enable_softmax=False",
                stacklevel=3,
            )
        elif self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("`enable_softmax_topk` is enabled and `top_k_lora` is not set: it takes all", stacklevel=3)

    def on_model(self, model: nn.Module, planned: Callable[[AdapterConfig], Any]) -> Self:
        """Reads which layers the adapters are on."""
        if has_encoder(model):
            raise ConfigError(
                f"X-LoRA weighs the tokens of one sequence, and {type(model).__name__} has an encoder and a decoder"
            )
        if not self.adapters:
            raise ConfigError("adapters must map the name of each LoRA to its folder or hub id", field="adapters")
        self.check_top_k(self.top_k_lora)
        made = self.copy(hidden_size=self._width(model))
        experts = tuple(self._read(name, source, model, planned) for name, source in self.adapters.items())
        paths = dict.fromkeys(path for expert in experts for path in expert.shapes)
        made.set_derived(experts=experts, target_modules=set(paths))
        return made

    def check_top_k(self, value: int | None) -> None:
        """Checks a number of adapters for each token.

        Raises:
            ConfigError: it is not positive, or larger than the number of adapters.
        """
        if value is None:
            return
        check_count("top_k_lora", value)
        if value > len(self.adapters or ()):
            raise ConfigError(
                f"top_k_lora = {value} is more than the {len(self.adapters or ())} adapters", field="top_k_lora"
            )

    def _width(self, model: nn.Module) -> int:
        """Features of the last hidden states."""
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None) or self.hidden_size
        if not isinstance(width, int):
            raise ConfigError(f"{type(model).__name__} does not state its hidden_size: set it", field="hidden_size")
        if self.hidden_size not in (None, width):
            raise ConfigError(
                f"hidden_size = {self.hidden_size}, but the hidden states of {type(model).__name__} have {width} "
                "features; leave it out",
                field="hidden_size",
            )
        return width

    def _read(self, name: str, source: str, model: nn.Module, planned: Callable[[AdapterConfig], Any]) -> Expert:
        config, reads = store_of(type(self)).adapter(source, model)
        if not isinstance(config, LoraConfig):
            raise ConfigError(
                f"adapters: {name!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}, and X-LoRA "
                "weighs LoRA adapters",
                field="adapters",
            )
        plan = planned(config)
        refusal = _refusal(config, plan)
        if refusal:
            raise ConfigError(f"adapters: {name!r} {refusal}", field="adapters")
        made = Expert(name, source, plan.config, {target.path: dict(target.shapes) for target in plan.targets})
        made.reads = reads
        return made


def with_parts(config: XLoraConfig, find: Callable[[str], str | None], options: Mapping[str, Any]) -> XLoraConfig:
    """A copy with the adapters' sources replaced by those saved with the file, by index as in PEFT or by name.

    Args:
        config: the config of a file.
        find: returns the folder of an adapter saved with the file; None if there is none.
        options: keyword arguments of loading; ``adapters`` among them replaces the config's.

    Raises:
        ConfigError: ``adapters`` does not have as many entries as the file.
    """
    given = options.get("adapters")
    if given is not None:
        made = XLoraConfig(adapters=given)
        if len(made.adapters or ()) != len(config.adapters or ()):
            raise ConfigError(
                f"adapters has {len(made.adapters or ())} entries, and the classifier of the file weighs "
                f"{len(config.adapters or ())} adapters",
                field="adapters",
            )
        return config.copy(adapters=made.adapters)
    named = {
        name: find(str(number)) or find(name) or source
        for number, (name, source) in enumerate((config.adapters or {}).items())
    }
    return config.copy(adapters=named)


def _refusal(config: LoraConfig, plan: Any) -> str:
    """Why an adapter cannot be part of an X-LoRA, as part of a sentence; empty if it can."""
    if config.initialised_from_weight:
        return f"starts in the weights of the base ({shown(config.init_lora_weights)}): convert it to a LoRA without"
    if config.is_quantization_aware:
        return "acts on rounded weights, which several cannot share"
    if plan.copies or plan.biases:
        trained = [*plan.copies, *plan.biases]
        return f"trains {few(trained, 2)} as a whole, which cannot be weighed: save it without"
    other = next((target for target in plan.targets if target.adapter_class is not LoRA or target.tied_to), None)
    if other is not None and other.adapter_class is LoRA:
        return f"shares its factors at {other.path} with another layer (ensure_weight_tying)"
    if other is not None:
        return f"is no plain LoRA: it has {other.adapter_class.__name__} at {other.path}"
    kinds = ((target.path, layer_kind_named(target.kind)) for target in plan.targets)
    place = next(((path, kind) for path, kind in kinds if not (kind.is_linear or kind.takes_ids)), None)
    return "" if place is None else f"is on {place[0]}, a {place[1].peft_name}, whose input is no tokens"
