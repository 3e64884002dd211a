"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638).

    y = l ∘ (W x + b)          l: (out, 1), on keys and values
    y = W (l ∘ x) + b          l: (1, in), on feed-forward layers

One vector a layer, which starts at ones, so training starts at the base model. Alone on a layer it costs no
second product: the input or the output of the one base call is multiplied. Together with other adapters it adds its
delta relative to the frozen layer, as every method does, so the order of adapters does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_takes_features, check_target_fields
from nbpeft.engine.config.targets import Matcher, matches_segment_names
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterConfig,
    AdapterSite,
    PeftType,
    TransformsInput,
    TransformsOutput,
)
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.combination import Combination, Member
from nbpeft.engine.contract.initial_draws import normal_, skip
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.errors import AdapterError, ConfigError

VECTOR = "ia3_l"

_USUAL: dict[str, tuple[str, str]] = {
    "llama mistral": ("k_proj v_proj", "down_proj"),
    "llama4 gemma gemma2 gemma3_text qwen2 qwen3": ("q_proj v_proj", "down_proj"),
    "mixtral": ("k_proj v_proj", "w2"),
    "t5": ("k v", "wo"),
    "mt5": ("k v wi_1", ""),
    "gpt2 gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "gpt_neox falcon RefinedWeb RefinedWebModel": ("query_key_value", "dense_4h_to_h"),
    "roberta bert": ("key value", "output.dense"),
    "opt": ("q_proj k_proj", "fc2"),
    "bart phi": ("q_proj v_proj", "fc2"),
    "gptj": ("q_proj v_proj", "fc_out"),
    "gpt_neo": ("q_proj v_proj", "c_proj"),
    "deberta-v2": ("key_proj value_proj", "output.dense"),
    "deberta": ("in_proj", "output.dense"),
}
"""Model types -> usual targets whose output is scaled, and those whose input is."""


_USUAL_TARGETS = {
    name: [*outputs.split(), *inputs.split()] for types, (outputs, inputs) in _USUAL.items() for name in types.split()
}
USUAL_INPUTS = {name: inputs.split() for types, (_, inputs) in _USUAL.items() for name in types.split()}
"""Model type -> the targets whose input is scaled by default; what scripts change here applies to new adapters."""


@dataclass
class IA3Config(AdapterConfig):
    """Config of (IA)³. Field names and defaults are PEFT's.

    Attributes:
        target_modules: names of the layers, a pattern, or "all-linear".
        exclude_modules: names or a pattern of layers to leave out.
        feedforward_modules: those of the targets whose input is scaled instead of their output.
        fan_in_fan_out: whether layers store their weight as (in, out); set when the adapter is added.
        modules_to_save: modules trained as a whole.
        init_ia3_weights: start at ones; False for random vectors.

    Raises:
        ConfigError: a value is invalid.
    """

    target_modules: Collection[str] | str | None = field(default=None)
    exclude_modules: Collection[str] | str | None = field(default=None)
    feedforward_modules: Collection[str] | str | None = field(default=None)
    fan_in_fan_out: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    init_ia3_weights: bool = field(default=True)

    checked_apart: ClassVar[tuple[str, ...]] = (
        *("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"),
    )
    rate_factor: ClassVar[float] = 20
    condenses_targets: ClassVar[bool] = False  # feedforward_modules must stay a subset of the targets
    slot_fields: ClassVar[tuple[str, ...]] = (*AdapterConfig.slot_fields, "feedforward_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("IA3")
        check_target_fields(self, name_fields=("feedforward_modules",))
        targets, inputs = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(inputs, set) and not inputs <= targets:
            missing = ", ".join(sorted(inputs - targets))
            raise ConfigError(
                f"feedforward_modules should be a subset of target_modules, which lack {missing}",
                field="feedforward_modules",
            )

    def fill_in(self, model_type: str | None) -> None:
        """Sets the usual ``feedforward_modules`` of a type of model if none are given."""
        if self.feedforward_modules is None:
            usual = USUAL_INPUTS.get(model_type or "")
            if usual is None:
                raise ConfigError(
                    "Please specify `feedforward_modules`: the targets whose input is scaled, [] for none; there is "
                    f"no default for model type {model_type!r}",
                    field="feedforward_modules",
                )
            self.feedforward_modules = set(usual)
        targets, inputs = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(inputs, set) and not inputs <= targets:
            matcher = Matcher(inputs)  # files must name a subset of the targets, which may be whole paths
            self.feedforward_modules = {target for target in targets if matcher.matches(target)}

    def scales_input(self, path: str) -> bool:
        """Whether the layer at a path is a feed-forward one."""
        inputs = self.feedforward_modules or ()
        return Matcher(inputs).matches(path) if isinstance(inputs, str) else matches_segment_names(path, inputs)


def _scaled(config: IA3Config) -> str:
    """Whether the vectors scale inputs, outputs or both."""
    if not config.feedforward_modules:
        return "outputs"
    return "inputs" if config.feedforward_modules == config.target_modules else "inputs and outputs"


class _CombineIA3:
    """Combines vectors: ``exact`` is the weighted sum of the deltas, ``linear`` PEFT's weighted sum of the vectors."""

    types = ("exact", "linear")
    usual_type = "linear"

    def takes(self, combination_type: str) -> Sequence[str]:
        """Nothing: there is no rank, and no entry is dropped."""
        return ()

    def __call__(
        self,
        layers: Mapping[str, Mapping[str, Member]],
        configs: Sequence[Any],
        adapters: Sequence[str],
        weights: Sequence[float],
        settings: Mapping[str, Any],
    ) -> Combination:
        for name in ("svd_rank", "svd_clamp", "svd_driver", "density"):
            if settings.get(name) is not None:
                raise ConfigError(f"{name} means nothing for (IA)³, whose vectors have no rank", field=name)
        kind = settings["combination_type"]
        weighted = list(zip(adapters, weights, strict=True))
        tensors: dict[str, dict[str, Tensor]] = {}
        inputs = set()
        for path, members in layers.items():
            here = [(members[name], weight * members[name].scale) for name, weight in weighted if name in members]
            if not here:
                continue
            vectors = [(_vector_of(path, member), weight) for member, weight in here]
            if len({isinstance(member.adapter, IA3OnInput) for member, _ in here}) > 1:
                raise AdapterError(f"adapters scale the input and the output of {path}: they cannot be combined")
            if isinstance(here[0][0].adapter, IA3OnInput):
                inputs.add(path)
            start = 1 if kind == "exact" else 0
            made = start + torch.stack([(vector.float() - start) * weight for vector, weight in vectors]).sum(0)
            tensors[path] = {VECTOR: made.to(vectors[0][0].dtype)}
        if not tensors:
            raise AdapterError(f"none of the adapters {', '.join(adapters)} has a vector on any layer")
        config = configs[0].copy(target_modules=set(tensors), feedforward_modules=inputs, exclude_modules=None)
        return Combination(config, tensors, kind)


def _vector_of(path: str, member: Member) -> Tensor:
    vector = member.tensors.get(VECTOR)
    if vector is None or not bool(torch.isfinite(vector).all()):
        raise AdapterError(f"an adapter has no finite vector at {path}: it cannot be combined", path=path)
    return vector.detach()


@register(
    IA3Config,
    peft_type="IA3",
    label="(IA)³",
    listing=Listing(
        when="few training rows; very few parameters",
        paper="arXiv:2205.05638",
        summary=lambda config: {"vectors": _scaled(config)},
    ),
    default_targets=lambda model_type: _USUAL_TARGETS.get(model_type or ""),
    sample_configs={
        "output": {"feedforward_modules": []},
        "input": {"feedforward_modules": ["target"]},
    },
    combine=_CombineIA3(),
)
class IA3(Adapter):
    """A vector on one layer."""

    reads_weight: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, float]] = {VECTOR: 1.0}
    peft: ClassVar[PeftNames] = PeftNames("ia3_l")

    @classmethod
    def parameter_shapes(cls, config: IA3Config, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The vector: (1, in) or (out, 1) of a linear layer, (1, channels, 1, …) of a convolution."""
        check_takes_features("(IA)³", path, kind)
        inputs = config.scales_input(path)
        features = kind.features(module)[0 if inputs else 1]
        if kind.is_linear:
            return {VECTOR: (1, features) if inputs else (features, 1)}
        return {VECTOR: (1, features, *[1] * (len(kind.weight_shape(module)) - 2))}

    @classmethod
    def _class_for(cls, config: IA3Config, site: AdapterSite) -> type[IA3]:
        return IA3OnInput if config.scales_input(site.path) else IA3OnOutput

    @classmethod
    def initial_tensors(cls, config: IA3Config, site: AdapterSite) -> Mapping[str, Tensor]:
        shape = site.shapes[VECTOR]
        if not config.init_ia3_weights:
            return {VECTOR: site.new(shape, normal_)}
        skip(normal_, site.device, shape)
        return {VECTOR: torch.ones(shape, device=site.device, dtype=site.dtype)}

    @property
    def vector(self) -> Tensor:
        """l, (features,)."""
        return self.tensor(VECTOR).flatten()


class IA3OnInput(IA3, TransformsInput):
    """The vector of a feed-forward layer."""

    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """``l ∘ x``, (…, in) or (batch, in, …), in the dtype of ``x``."""
        vector = _along(base, self.vector.to(x.device))
        return (x.to(vector.dtype) * vector).to(x.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``W ((l - 1) ∘ x)``, shaped like the output."""
        vector = _along(base, self.vector - 1)
        scaled = x.to(vector.dtype) * vector
        return base.kind.apply(base.module, scaled, base.weight().to(scaled.dtype))

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``(l - 1)`` times the columns of the weight."""
        change = (self.vector.detach() - 1).to(weight.dtype)
        groups = int(getattr(base.module, "groups", 1))
        rows = change.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        return weight * rows.view(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


class IA3OnOutput(IA3, TransformsOutput):
    """The vector of any other layer."""

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """``l ∘ y``, in the dtype of ``y``."""
        vector = base.kind.per_channel(base.module, self.vector)
        return (output.to(vector.dtype) * vector).to(output.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``(l - 1) ∘ y``, the bias of the layer included."""
        change = base.kind.per_channel(base.module, self.vector - 1)
        return base_output.to(change.dtype) * change

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``(l - 1)`` times the rows of the weight."""
        change = (self.vector.detach() - 1).to(weight.dtype)
        return weight * change.view(-1, *[1] * (weight.ndim - 1))

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """``(l - 1)`` times the bias."""
        bias = base.bias
        return None if bias is None else (self.vector.detach() - 1).to(bias.dtype) * bias


def _along(base: BaseLayer, vector: Tensor) -> Tensor:
    """A vector over input features so that it multiplies the layer's input."""
    return vector if base.kind.is_linear else vector.view(1, -1, *[1] * (len(base.kind.weight_shape(base.module)) - 2))
