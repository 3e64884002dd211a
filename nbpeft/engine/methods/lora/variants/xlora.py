"""X-LoRA: a mixture of LoRA adapters with weights for each token (Buehler and Buehler 2024, arXiv:2402.07148).

    y = W x + b + g Σ_i c_i s_i B_i A_i x        c = softmax(classifier(h) / temperature)

The adapters are already trained and frozen, unless ``use_trainable_adapters`` is set; the classifier is trained. Its
input is the last hidden states h of a first pass, in which each adapter has the weight ``scaling_pass_value``: with the
default 0, those of the base model. The weights are per token, (rows, length), for all layers or for each layer.

PEFT numbers the adapters and looks up the config's names among the numbers, so names other than 0, 1, … raise in each
call. It does not save those tensors of the classifier whose name contains the number of an adapter, and saves the base
model as well. It adds the bias of B (``lora_bias``) with a weight of 1, even in the first pass; it does not apply the
weights when gradient checkpointing recomputes a layer, which changes the gradients; and it supports no cache of keys
and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.calls.first_pass import NeedsFirstPass
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, HasInnerAdapters, HotSwaps, SharedSite, SharedState
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.method_records import CallInputs, FileFormat, Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.engine.kernels.storage import loaded
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.lora import LoRA
from nbpeft.engine.methods.lora.variants.xlora_classifier import XLoraClassifier
from nbpeft.engine.methods.lora.variants.xlora_config import XLoraConfig, with_parts
from nbpeft.errors import AdapterError, ConfigError, shown

CLASSIFIER = "internal_xlora_classifier"
_IN_PEFT = re.compile(r"base_model\.lora_model\.model\.(.+)\.(lora_(?:embedding_)?[AB])\.(\d+)(\.weight|\.bias)?")
"""Name of an adapter's tensor in a file, as in PEFT's model."""
_HERE = re.compile(r"base_model\.model\.(.+)\.(\d+)\.(lora_(?:embedding_)?[AB])(_bias)?")
"""The name below the path of the layer."""


class XLoraState(SharedState, NeedsFirstPass):
    """The classifier, and its predictions for a call.

    Attributes:
        start: path -> the adapters for a layer, until the layer takes them.
        numbers: path -> index of the layer.
    """

    start: dict[str, dict[str, LoRA]]
    numbers: dict[str, int]

    def __init__(self, config: XLoraConfig, classifier: XLoraClassifier, *, is_new: bool) -> None:
        super().__init__()
        self._modules[CLASSIFIER] = classifier
        self.bind(config=config, start={}, numbers={}, is_new=is_new)

    config: XLoraConfig
    is_new: bool

    @property
    def classifier(self) -> Any:
        """The classifier."""
        return self._modules[CLASSIFIER]

    @classmethod
    def tensor_shapes(cls, config: XLoraConfig, features: Mapping[str, tuple[int, int]]) -> Shapes:
        with torch.device("meta"):
            made = XLoraClassifier(config, len(config.experts), len(features))
        return {f"{CLASSIFIER}.{name}": tuple(one.shape) for name, one in made.named_parameters()}

    @classmethod
    def create(cls, config: XLoraConfig, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds a loaded classifier; a new one is drawn after the adapters, as in PEFT."""
        layers = list(site.shapes.values())[-1][0] // len(config.experts)
        with torch.device("meta"):
            classifier = XLoraClassifier(config, len(config.experts), layers)
        for name, parameter in classifier.named_parameters():
            given = (
                torch.empty(parameter.shape, device=site.device, dtype=site.dtype)
                if tensors is None
                else tensors[f"{CLASSIFIER}.{name}"].to(site.device, site.dtype)
            )
            owner, _, own = name.rpartition(".")
            setattr(classifier.get_submodule(owner), own, nn.Parameter(given))
        return cls(config, classifier, is_new=tensors is None)

    def place(self, layers: Mapping[str, BaseLayer]) -> None:
        """Reads the adapters, and repeats PEFT's draws."""
        self.numbers.update({path: number for number, path in enumerate(layers)})
        self.classifier.n_layers = len(layers)
        dtype = self.classifier.layers[-1].weight.dtype
        for number, expert in enumerate(self.config.experts):
            tensors = expert.tensors()
            for path, shapes in expert.shapes.items():
                site = AdapterSite(path, layers[path], shapes, dtype)
                made = LoRA.create(expert.config, site, None)
                for name, parameter in made.named_parameters():
                    _fill(parameter, tensors[path][name])
                self.start.setdefault(path, {})[str(number)] = made
        if self.is_new:
            for layer in self.classifier.layers:
                if isinstance(layer, nn.Linear):
                    drawn = nn.Linear(layer.in_features, layer.out_features)
                    _fill(layer.weight, drawn.weight)
                    _fill(layer.bias, drawn.bias)

    @property
    def first_context(self) -> float:
        """The weight of each adapter in the first pass."""
        return float(self.config.scaling_pass_value * self.config.global_scaling_weight)

    def context(self, hidden: Tensor) -> Tensor:
        """The weights of the adapters, (rows, length, layers, adapters)."""
        classifier = self.classifier
        return classifier.chosen(classifier(hidden)) * self.config.global_scaling_weight


@torch.no_grad()
def _fill(parameter: Any, tensor: Tensor) -> None:
    """Copies a tensor into a parameter, unless the parameter has no data (fake tensor)."""
    if not (parameter.is_meta or isinstance(parameter, loaded("torch._subclasses.fake_tensor", "FakeTensor"))):
        parameter.copy_(tensor)


def _packed(config: XLoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PEFT's names."""
    return {
        _HERE.sub(
            lambda found: (
                f"base_model.lora_model.model.{found[1]}.{found[3]}.{found[2]}"
                + (".bias" if found[4] else "" if "embedding" in found[3] else ".weight")
            ),
            key,
        ): tensor
        for key, tensor in tensors.items()
    }


def _unpacked(config: XLoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the paths of the layers."""
    return {
        _IN_PEFT.sub(
            lambda found: (
                f"base_model.model.{found[1]}.{found[3]}.{found[2]}" + ("_bias" if found[4] == ".bias" else "")
            ),
            key,
        ): tensor
        for key, tensor in tensors.items()
    }


def _parts(manager: Any, name: str) -> dict[str, tuple[LoraConfig, dict[str, dict[str, Tensor]]]]:
    """Config and tensors of the adapters as they are now, by index."""
    layers = {path: layer.adapter(name) for path, layer in manager.layers_with(name).items()}
    return {
        str(number): (
            expert.config.copy(inference_mode=True),
            {
                path: dict(layers[path].inner_adapters[str(number)].named_parameters())
                for path in expert.shapes
                if path in layers  # layers may have been taken out of the model
            },
        )
        for number, expert in enumerate(manager.configs[name].experts)
    }


def _state(manager: Any) -> XLoraState:
    """The shared state of a model's X-LoRA adapter, preferably of an active one."""
    for name in (*manager.active, *manager.configs):
        state = manager.shared(name)
        if isinstance(state, XLoraState):
            return state
    raise AdapterError("the model has no X-LoRA adapter")


def set_topk_lora(manager: Any, value: int | None) -> None:
    """Sets the number of adapters that a token uses; None for all."""
    config = _state(manager).config
    config.check_top_k(value)
    config.top_k_lora = value


def set_global_scaling_weight(manager: Any, weight: float) -> None:
    """Sets the factor on the sum of the adapters' deltas."""
    _state(manager).config.global_scaling_weight = _number("weight", weight)


def get_global_scaling_weight(manager: Any) -> float:
    """Returns the factor on the sum of the adapters' deltas."""
    return _state(manager).config.global_scaling_weight


def set_scaling_pass_value(manager: Any, value: float | None) -> None:
    """Sets the weight of each adapter in the first pass; None for 1 divided by the number of adapters."""
    state = _state(manager)
    state.config.scaling_pass_value = 1 / state.classifier.n_classes if value is None else _number("value", value)


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, not {shown(value)}", field=name)
    return value


def get_latest_scalings(manager: Any) -> Tensor | None:
    """Returns the last predicted weights, (rows, length, layers, adapters); None if there are none."""
    return _state(manager).classifier.latest


def get_scalings_log(manager: Any) -> list[Tensor]:
    """Returns the logged weights, oldest first."""
    return list(_state(manager).classifier.log_scalings)


def get_bucketed_scalings_log(manager: Any) -> dict[int, tuple[list[int], list[Tensor]]]:
    """Returns the logged weights by input length: length -> indices in the log, and the weights."""
    return _state(manager).classifier.bucketed()


def enable_scalings_logging(manager: Any) -> None:
    """Logs predicted weights from now on."""
    _state(manager).classifier.scalings_logging = True


def disable_scalings_logging(manager: Any) -> None:
    """Stops logging; the log is kept."""
    _state(manager).classifier.scalings_logging = False


def clear_scalings_log(manager: Any) -> None:
    """Empties the log."""
    _state(manager).classifier.log_scalings.clear()


_FUNCTIONS = (
    *(set_topk_lora, set_global_scaling_weight, get_global_scaling_weight, set_scaling_pass_value),
    *(get_latest_scalings, get_scalings_log, get_bucketed_scalings_log),
    *(enable_scalings_logging, disable_scalings_logging, clear_scalings_log),
)


def _without_cache(config: XLoraConfig, model: nn.Module) -> dict[str, Any]:
    """``use_cache=False`` for ``generate`` if the model's config has it, which ``generate`` does not read itself."""
    return {} if getattr(getattr(model, "config", None), "use_cache", True) else {"use_cache": False}


@register(
    XLoraConfig,
    peft_type="XLORA",
    label="X-LoRA",
    listing=Listing(
        when="mixing several trained LoRAs: a classifier weights them for each token",
        paper="arXiv:2402.07148",
        summary=lambda config: {
            "adapters": str(len(config.adapters)),
            **({"top k": str(config.top_k_lora)} if config.top_k_lora else {}),
        },
    ),
    shares=SharedTensors(state=XLoraState),
    calls=CallInputs(context=lambda config, args, kwargs: None, generation=_without_cache),
    files=FileFormat(has_tensors=False, pack=_packed, unpack=_unpacked, parts=_parts, with_parts=with_parts),
)
class XLoraLayer(Adapter, HasInnerAdapters, HotSwaps):
    """The adapters of one layer, by index.

    Attributes:
        state: the shared state, which predicts their weights.
        number: index of the layer.
    """

    peft: ClassVar[PeftNames] = PeftNames(
        model_functions={function.__name__: function for function in _FUNCTIONS},
        model_attributes={
            CLASSIFIER: lambda tuner: _state(tuner.manager).classifier,
            "internal_xlora_scalings": lambda tuner: get_latest_scalings(tuner.manager),
            "lora_model": lambda tuner: tuner,
            "xlora_config": lambda tuner: _state(tuner.manager).config,
        },
    )
    state: XLoraState
    number: int

    @classmethod
    def parameter_shapes(cls, config: XLoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Those of the adapters, if they are trained."""
        if not config.use_trainable_adapters:
            return {}
        return {
            f"{number}.{name}": shape
            for number, expert in enumerate(config.experts)
            for name, shape in expert.shapes.get(path, {}).items()
        }

    @classmethod
    def create(cls, config: XLoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Creates it from the adapters that were read, with saved tensors if there are any."""
        assert isinstance(site.shared, XLoraState)
        made = cls(site.shared, site.path)
        for name, tensor in (tensors or {}).items():
            number, _, own = name.partition(".")
            made.inner_adapters[number].bind({own: tensor})
        if not config.use_trainable_adapters:
            frozen = tuple(name for name, _ in made.named_parameters())
            made.bind(frozen_parameters=frozen)
            made.requires_grad_(False)
        return made

    def __init__(self, state: XLoraState, path: str) -> None:
        super().__init__()
        self.bind(state=state, number=state.numbers[path])
        self._modules.update(state.start.pop(path))

    @property
    def inner_adapters(self) -> Mapping[str, Adapter]:
        return {name: module for name, module in self._modules.items() if isinstance(module, Adapter)}

    def saved_tensors(self, shapes: Any) -> dict[str, Tensor]:
        if self.frozen_parameters:
            return {}
        adapters = self.inner_adapters.items()
        return {f"{number}.{name}": value for number, adapter in adapters for name, value in adapter.named_parameters()}

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The sum of the adapters' deltas, weighted for each token.

        The context of ``base`` is the weights of the call, (rows, length, layers, adapters), one number for all, or
        None if the layer is called outside of the model: then each adapter has the weight 1.

        Raises:
            AdapterError: the tokens of the input are not those of the call.
        """
        given = base.context
        if isinstance(given, Tensor):
            given = self._of_tokens(given, base_output)
        elif given == 0.0:
            return base_output.new_zeros(()).expand_as(base_output)
        total: Tensor | None = None
        for name, expert in self.inner_adapters.items():
            weight = given[..., int(name) : int(name) + 1] if isinstance(given, Tensor) else given
            added = _weighed(expert, x, base_output, base, weight)
            total = added if total is None else total + added
        assert total is not None
        return total

    def _of_tokens(self, weights: Tensor, output: Tensor) -> Tensor:
        """The weights of the layer, (…, adapters), for an output (…, out)."""
        if weights.grad_fn is not None and torch._C._current_graph_task_id() != -1:
            _check_recomputed()
        own = weights[:, :, self.number].to(output.device)
        if output.shape[:-1] == own.shape[:-1]:
            return own
        if output.dim() == 2 and len(output) == own.shape[:-1].numel():
            return own.flatten(0, 1)
        raise AdapterError(
            f"X-LoRA weighs the {tuple(own.shape[:-1])} tokens of a call, and a layer gave an output of shape "
            f"{tuple(output.shape)}: use adapters without that layer"
        )

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "a weight: X-LoRA weights its adapters for each token"

    def swap_refusal(self) -> str:
        return "consists of several adapters; load the other one under another name and switch with set_adapter()"

    def configure(self, config: XLoraConfig, path: str) -> None:
        self.state.bind(config=config)
        self.state.classifier.config = config

    def keep_settings(self, change: Transaction) -> None:
        change.keep_attributes(self.state, "config")
        change.keep_attributes(self.state.classifier, "config")


def _check_recomputed() -> None:
    """Refuses reentrant checkpointing, which recomputes layers one by one: the classifier needs all their gradients.

    Raises:
        AdapterError: a layer is recomputed by reentrant checkpointing.
    """
    node = torch._C._current_autograd_node()
    if node is not None and node.name() == "CheckpointFunctionBackward":
        raise AdapterError(
            "X-LoRA does not train with reentrant gradient checkpointing: pass "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def _weighed(expert: Any, x: Tensor, base_output: Tensor, base: BaseLayer, weight: Tensor | float | None) -> Tensor:
    """One adapter's delta times a weight for each token, (…, 1), or for all.

    The weight is applied to the few hidden values between the factors, at little cost.
    """
    if expert.observed is not None or weight is None:
        whole: Tensor = expert(x, base_output, base)
        return whole if weight is None else whole * weight
    lora_A, lora_B = expert.trained_factors
    scaling = expert.scaling * weight
    low_rank, dtype = expert.low_rank, compute_dtype(x if x.is_floating_point() else lora_A, lora_A)
    if isinstance(scaling, Tensor):
        scaling = scaling.to(dtype)
    if not low_rank.has_steps:
        return low_rank.forward(base.module, x, (lora_A, lora_B, scaling), None)
    dropped = F.dropout(x.to(lora_A.device, dtype), expert.dropout, expert.training)
    hidden = low_rank.down(base.module, dropped, lora_A.to(dtype)) * scaling
    added: Tensor = low_rank.up(base.module, hidden, lora_B.to(dtype), None)
    bias = expert.output_bias
    return added if bias is None else added + bias.to(dtype) * scaling
