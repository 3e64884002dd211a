"""BEFT: trains one bias per layer, usually of the value projections (Huang et al. 2025, arXiv:2509.15974).

    y = W x + b + β        β: (1, out)

Layers without a bias can have one too, but it cannot be merged there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, MergesInPlace, TransformsOutput
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import compute_dtype

BIAS = "beft_bias"
_VALUES = {
    "v": "mt5 t5",
    "value": "bert roberta",
    "value_proj": "deberta-v2",
    "v_proj": ("bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3"),
}
"""Name of the value projections -> model types."""


@dataclass
class BeftConfig(LayersConfig):
    """Config of BEFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        init_weights: start at the base model; False for random biases.
    """

    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "BEFT"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    value_fields: ClassVar[tuple[str, ...]] = ("init_weights",)


def _value_projections(model_type: str | None) -> list[str] | None:
    return next(([name] for name, types in _VALUES.items() if model_type in types.split()), None)


@register(
    BeftConfig,
    label="BEFT",
    listing=Listing(
        when="few examples: one bias per layer, very few parameters, fast steps",
        paper="arXiv:2509.15974",
        summary=lambda config: {"trains": "biases"},
    ),
    default_targets=_value_projections,
    sample_configs={"bias": {}},
)
class Beft(Adapter, TransformsOutput, MergesInPlace):
    """The change of the bias of one layer, (1, out)."""

    peft: ClassVar[PeftNames] = PeftNames("beft_bias")

    @classmethod
    def parameter_shapes(cls, config: BeftConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The bias, as PEFT shapes it."""
        check_linear("BEFT", path, kind)
        return {BIAS: (1, kind.features(module)[1])}

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        bare = [path for path, module, _ in modules if getattr(module, "bias", None) is None]
        if bare:
            more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
            yield f"{bare[0]}{more} has no bias in the base: the adapter cannot be merged there"

    @classmethod
    def initial_tensors(cls, config: BeftConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """β at zeros, or random."""
        bias = site.new(site.shapes[BIAS], normal_)
        return {BIAS: bias.zero_() if config.init_weights else bias}

    @property
    def bias(self) -> Tensor:
        """The trained bias, (out,)."""
        return self.tensor(BIAS).flatten()

    @property
    def delta_rank(self) -> int | None:
        return 0

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """``y + β``, in the dtype of ``y``."""
        return (output + self.bias).to(output.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """β, shaped like the output."""
        bias = self.bias
        return bias.to(compute_dtype(x, bias)).expand(base_output.shape)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        return torch.zeros_like(weight)

    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        """Does nothing: only the bias changes."""

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """β, detached."""
        return self.bias.detach()
