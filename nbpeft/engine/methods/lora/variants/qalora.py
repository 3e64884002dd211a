"""QA-LoRA: LoRA on the means of groups of inputs (Xu et al. 2023, arXiv:2309.14717).

    y = W x + b + s * B A p(dropout(x))       A: (r, in / g), B: (out, r)
    p(x) = in / g * the mean of each group of g consecutive inputs

If g is the group size of a quantized weight, the delta is constant within each group of a row, like a zero point.
PEFT supports it on GPTQ layers only, and treats such a config as plain LoRA on others; here it works on every linear
layer. The delta is LoRA's product with the columns of A repeated, so it can be merged wherever LoRA can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import linear_
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.dropout import Dropout, lean_dropout
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.initialization.inits import Factors, init_whole_factors
from nbpeft.engine.methods.lora.low_rank import FactorShapes
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.errors import ConfigError

_NOT_DROPPED = Dropout(0.0, False)


@register(
    LoraConfig,
    label="QALoRA",
    listing=listing(
        when="quantized models: a smaller first factor, which sees groups of inputs",
        paper="arXiv:2309.14717",
        listed_with={"use_qalora": True},
    ),
    applies=lambda config: config.variant == "use_qalora",
    sample_configs={"groups": {"r": 4, "lora_alpha": 8, "use_qalora": True, "qalora_group_size": 4}},
    **FAMILY,
)
class QALoRA(LowRankProduct):
    """A QA-LoRA adapter on one linear layer.

    Attributes:
        group_size: number of inputs in a group.
    """

    linear_setting: ClassVar[str] = "use_qalora"
    from_config: ClassVar[Mapping[str, str]] = {**LowRankProduct.from_config, "group_size": "qalora_group_size"}
    observable: ClassVar[bool] = False
    peft: ClassVar[PeftNames] = replace(
        LowRankAdapter.peft, attributes={**LowRankAdapter.peft.attributes, "qalora_group_size": "group_size"}
    )

    group_size: int

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, (r, in / g), and B."""
        shapes = super().parameter_shapes(config, path, module, kind)
        in_features, size = kind.features(module)[0], config.qalora_group_size
        if in_features % size:
            raise ConfigError(
                f"{path}: its {in_features} inputs cannot be split into groups of qalora_group_size = {size}: choose a "
                "number that divides them, or exclude the layer",
                field="qalora_group_size",
                path=path,
            )
        (name_A, (rank, _)), *others = shapes.items()
        return {name_A: (rank, in_features // size), **dict(others)}

    def shapes_at(self, size: int, base: BaseLayer) -> FactorShapes:
        (rank, in_features), shape_B = super().shapes_at(size, base)
        return (rank, in_features // self.group_size), shape_B

    @classmethod
    def drawn_tensors(cls, config: LoraConfig, site: AdapterSite, initial: Factors | None) -> dict[str, Tensor]:
        """The factors, with A drawn after one of LoRA's shape as in PEFT."""
        name_A = next(iter(site.shapes))
        return {**init_whole_factors(config, site), name_A: site.new(site.shapes[name_A], linear_)}

    @property
    def own_factors(self) -> tuple[Tensor, Tensor]:
        """A with its columns repeated, (r, in), and B."""
        lora_A, lora_B = self.trained_factors
        return lora_A.repeat_interleave(self.group_size, 1) * (lora_A.shape[1] / self.group_size), lora_B

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer, fused: bool = False) -> Tensor:
        """``s * B A p(dropout(x))``, p the means of the groups."""
        lora_A, lora_B = self.trained_factors
        x = lean_dropout(x.to(compute_dtype(x, lora_A)), Dropout(self.dropout, self.training))
        means = x.reshape(*x.shape[:-1], -1, self.group_size).mean(-1)
        scaling, onto = self.scaling * lora_A.shape[1], base_output if fused else None
        return self.low_rank.forward(base.module, means, (lora_A, lora_B, scaling), _NOT_DROPPED, onto)
