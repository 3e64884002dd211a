"""LN tuning: the weights and biases of norms, and nothing else (Zhao et al. 2023, arXiv:2312.11420).

    y = norm(x) ∘ w + b        w, b: trained copies of the layer's weight and bias

A norm runs once, with the copies instead of its parameters. Any other layer that is named as a target is trained as a
whole in the same way, if its weight is not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ReplacesCall
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import parameter_of, with_parameters
from nbpeft.engine.contract.method_records import FileFormat, Listing, OwnKinds
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register, resolve_backend
from nbpeft.engine.layer_kinds.conv1d import TransformersConv1D
from nbpeft.engine.layer_kinds.convolution import Conv1d, Conv2d, Conv3d
from nbpeft.engine.layer_kinds.embedding import Embedding
from nbpeft.engine.layer_kinds.linear import Linear
from nbpeft.errors import TargetError

WEIGHT, BIAS = "weight", "bias"
COPIES = "ln_tuning_layers"
OWN = {COPIES: WEIGHT, f"{COPIES}_bias": BIAS}
"""Parameter of an adapter -> parameter of the layer that it copies."""
_BLOCK = ["input_layernorm", "post_attention_layernorm"]
_FOUR = [*_BLOCK, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"]
_TARGETS = {
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "bloom": [*_BLOCK, "ln_f"],
    "falcon": [*_BLOCK, "ln_f"],
    "gemma": [*_BLOCK, "norm"],
    "gemma2": _FOUR,
    "gemma3_text": _FOUR,
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "llama": [*_BLOCK, "norm"],
    "mistral": [*_BLOCK, "norm"],
    "mt5": ["layer_norm", "final_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
    "qwen2": ["post_attention_layernorm"],
    "qwen3": ["post_attention_layernorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
"""Model type -> usual targets. LLaVA's are not here: PEFT trains its embeddings and head, too."""


class Norm:
    """A norm over the last dimension with a weight for each feature, of torch or of a model's own file."""

    name = "norm"
    peft_name = "Norm"
    is_linear = False
    takes_ids = False

    def matches(self, module: nn.Module) -> bool:
        """Whether the class name contains "norm" and the weight is a vector; batch and group norms do not match."""
        weight = parameter_of(module, WEIGHT)
        other = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
        return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1 and not other

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(features, features)."""
        count = self.weight_shape(module)[0]
        return count, count

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        """(features,)."""
        return tuple(module.get_parameter(WEIGHT).shape)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The same."""
        return weight

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The norm with another weight and no bias."""
        bias = None if parameter_of(module, BIAS) is None else torch.zeros_like(weight)
        return _computed(module, x, {WEIGHT: weight, BIAS: bias})

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        """The same."""
        return vector


def _computed(module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor | None]) -> Tensor:
    """The output of a layer with other parameters."""
    return type(module).forward(with_parameters(module, parameters), x)


@dataclass
class LNTuningConfig(LayersConfig):
    """Config of LN tuning. Field names are PEFT's; see ``LayersConfig`` for the target fields."""

    method_type: ClassVar[str] = "LN_TUNING"
    not_in_peft: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")


@register(
    LNTuningConfig,
    label="LN tuning",
    listing=Listing(
        when="very few parameters: trains only norms, and adds nothing to the model",
        paper="arXiv:2312.11420",
        summary=lambda config: {"trains": "norms"},
    ),
    default_targets=lambda model_type: _TARGETS.get(model_type or ""),
    sample_configs={"norms": {}},
    files=FileFormat(keys={name: f"{COPIES}.{own}" for name, own in OWN.items()}),
    kinds=OwnKinds(
        only=(Norm(), Embedding(), TransformersConv1D(), Conv1d(), Conv2d(), Conv3d(), Linear()), linear=False
    ),
)
class LNTuning(Adapter, ReplacesCall):
    """The copies of one layer's weight and bias, shaped as the layer stores them: (features,) for a norm."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames("ln_tuning_layers", layer="ln_tuning.LNTuningLayer", wrapped=(COPIES,))

    @classmethod
    def parameter_shapes(cls, config: LNTuningConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The shapes of the layer's weight and bias; see ``Adapter``.

        Raises:
            TargetError: the weight is quantized.
        """
        backend = resolve_backend(module)
        if backend is None or backend.name != "dense":
            raise TargetError(
                f"{path} cannot be adapted by LN tuning, which copies its weight: that is quantized; exclude it",
                path=path,
                kind=type(module).__name__,
            )
        return {name: tuple(own.shape) for name, of in OWN.items() if (own := parameter_of(module, of)) is not None}

    @classmethod
    def initial_tensors(cls, config: LNTuningConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        own = _own(site.base)
        return {name: own[name].to(site.base.device, site.dtype, copy=True) for name in site.shapes}

    def output(self, x: Tensor, base: BaseLayer) -> Tensor:
        copies = {own: copy for name, own in OWN.items() if (copy := self.tensor(name, optional=True)) is not None}
        copies = {own: copy.to(x.device, base.dtype) for own, copy in copies.items()}
        return _computed(base.module, x, copies)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        return self.output(x, base) - base_output

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        copied = base.kind.canonical(base.module, self.tensor(COPIES).detach())
        return copied - weight.to(copied)

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        bias, copied = base.bias, self.tensor(f"{COPIES}_bias", optional=True)
        return None if bias is None or copied is None else copied.detach() - bias.detach().to(copied)

    @torch.no_grad()
    def reset_(self, base: BaseLayer) -> None:
        for name, own in _own(base).items():
            self.get_parameter(name).copy_(own)


def _own(base: BaseLayer) -> dict[str, Tensor]:
    """Parameter of an adapter -> the layer's parameter as stored, detached."""
    own = {COPIES: base.kind.canonical(base.module, base.weight())}
    return own if base.bias is None else own | {f"{COPIES}_bias": base.bias.detach()}
