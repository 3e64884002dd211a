"""HiRA: the Hadamard product of the weight and a low-rank product (Huang et al. 2025, ICLR).

    Δ = W ∘ (B A)        A: (r, in), B: (out, r); Δ has the rank of W, or nearly

An embedding's rows are multiplied as they are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_count, check_ungrouped
from nbpeft.engine.config.layers_config import HasFanInFanOut
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import linear_, normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta

_FACTORS, _EMBEDDING_FACTORS = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


@dataclass
class HiraConfig(HasFanInFanOut):
    """Config of HiRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of the product that the weight is multiplied with.
        hira_dropout: dropout probability of the adapter's input, from 0 to 1.
        init_weights: True and 'gaussian' start at the base model; False for random factors.
        rank_pattern: layer name or pattern -> another r.
    """

    r: int = field(default=32)
    hira_dropout: float = field(default=0.0)
    init_weights: bool | str | None = field(default=True)
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    method_type: ClassVar[str] = "HIRA"
    counts: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("hira_dropout",)
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {"rank_pattern": check_count}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_weights": (True, False, "gaussian")}
    value_fields: ClassVar[tuple[str, ...]] = ("hira_dropout", "init_weights")

    def rank_at(self, path: str) -> int:
        """The rank at a module path."""
        return int(pattern_table(self, "rank_pattern").get(path, self.r))


@register(
    HiraConfig,
    label="HiRA",
    listing=Listing(
        when="hard tasks: a high-rank change with as many parameters as LoRA",
        paper="https://openreview.net/forum?id=TwJrTz9cRS",
    ),
    default_targets=usual_targets,
    sample_configs={"r4": {"r": 4}},
)
class Hira(WeightDelta):
    """The two factors of one layer."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "hira_A hira_B hira_embedding_A hira_embedding_B", "r hira_dropout", attributes={"r": "rank"}
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "hira_dropout"}

    dropout: float

    @classmethod
    def parameter_shapes(cls, config: HiraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, (r, in, *kernel), and B, (out, r, 1, …)."""
        check_ungrouped("HiRA", path, module)
        rank, (rows, columns, *kernel) = config.rank_at(path), kind.weight_shape(module)
        names = _EMBEDDING_FACTORS if kind.takes_ids else _FACTORS
        return dict(zip(names, ((rank, columns, *kernel), (rows, rank, *[1] * len(kernel))), strict=True))

    @classmethod
    def initial_tensors(cls, config: HiraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """Random factors, but for B, or the A of an embedding, at zeros."""
        drawn = {name: site.new(shape, normal_) for name, shape in site.shapes.items()}
        name_A, name_B = site.shapes
        if not config.init_weights:
            return drawn
        if name_A in _EMBEDDING_FACTORS:
            return {name_A: drawn[name_A].zero_(), name_B: site.new(site.shapes[name_B], normal_)}
        narrow = partial(normal_, std=1 / config.rank_at(site.path))
        start = narrow if config.init_weights == "gaussian" else linear_
        return {name_A: site.new(site.shapes[name_A], start), name_B: drawn[name_B].zero_()}

    @property
    def rank(self) -> int:
        """The rank: rows of A."""
        return int(self.tensors[0].shape[0])

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The layer's map with ``W ∘ (B A)``."""
        if base.kind.takes_ids:
            first, second = self.tensors
            rows = F.embedding(x, first.T) @ second.T
            return base_output.to(rows.dtype) * rows
        return super().forward(F.dropout(x, self.dropout, self.training), base_output, base)

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """``W ∘ (B A)``."""
        return _product(base.weight(), *parameters)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``W ∘ (B A)``, of the given weight."""
        return _product(weight, *(tensor.detach() for tensor in self.tensors))

    def reset_(self, base: BaseLayer) -> None:
        self.tensors[0 if base.kind.takes_ids else 1].detach().zero_()


def _product(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``W ∘ (B A)``, shaped like the weight, in the dtype of the factors."""
    return weight.to(first.dtype) * (second.flatten(1) @ first.flatten(1)).view(weight.shape)
