"""DeLoRA: low-rank adaptation with separate strength and direction (Bini et al. 2025, arXiv:2503.18225).

    Δ = B diag(λ / (r ‖a_i‖ ‖b_i‖)) A diag(‖w_j‖)        A: (r, in) with rows a_i, B: (out, r) with columns b_i

λ, which is trained, bounds how far the weight can move; w_j are the columns of the frozen weight when the adapter was
created, and their norms are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_count, check_linear, check_number
from nbpeft.engine.config.layers_config import TrainsBiases
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, HasFixedTensors, Shape
from nbpeft.engine.contract.base import LayerKind, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import linear_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import ComputedFactors, keeping_inputs

FACTOR_A, FACTOR_B, BOUND, NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_LEAST_NORM = 1e-4


@dataclass
class DeloraConfig(TrainsBiases):
    """Config of DeLoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of the factors.
        delora_lambda: initial value of the bound λ.
        module_dropout: dropout probability of the adapter's input, from 0 to 1.
        init_weights: start at the base model; False for random factors.
        rank_pattern: layer name or pattern -> another r.
        lambda_pattern: layer name or pattern -> another delora_lambda.
    """

    r: int = field(default=8)
    delora_lambda: float = field(default=15)
    module_dropout: float = field(default=0.0)
    init_weights: bool = field(default=True)
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)

    method_type: ClassVar[str] = "DELORA"
    counts: ClassVar[tuple[str, ...]] = ("r",)
    shares: ClassVar[tuple[str, ...]] = ("module_dropout",)
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {
        "rank_pattern": check_count,
        "lambda_pattern": check_number,
    }
    value_fields: ClassVar[tuple[str, ...]] = ("module_dropout", "init_weights")

    def rank_at(self, path: str) -> int:
        """The rank at a module path."""
        return int(pattern_table(self, "rank_pattern").get(path, self.r))

    def lambda_at(self, path: str) -> float:
        """The initial bound at a module path."""
        return float(pattern_table(self, "lambda_pattern").get(path, self.delora_lambda))


@register(
    DeloraConfig,
    label="DeLoRA",
    listing=Listing(
        when="like LoRA, with a limit on how far each layer can move; robust learning rates",
        paper="arXiv:2503.18225",
        summary=lambda config: {"r": str(config.r), "λ": f"{config.delora_lambda:g}"},
    ),
    default_targets=usual_targets,
    sample_configs={"r4": {"r": 4, "delora_lambda": 2}},
)
class Delora(ComputedFactors, HasFixedTensors):
    """Two factors and the bound of one layer, and the norms of the weight's columns, (in,), which are not trained."""

    peft: ClassVar[PeftNames] = PeftNames(
        "delora_A delora_B delora_lambda",
        "r delora_dropout delora_w_norm",
        layer_prefix="Delora",
        attributes={"r": "rank"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "module_dropout"}
    identity: ClassVar[Mapping[str, float]] = {FACTOR_B: 0.0}

    @classmethod
    def parameter_shapes(cls, config: DeloraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, (r, in), B, (out, r), and the bound, (1,)."""
        check_linear("DeLoRA", path, kind)
        rank, (in_features, out_features) = config.rank_at(path), kind.features(module)
        return {FACTOR_A: (rank, in_features), FACTOR_B: (out_features, rank), BOUND: (1,)}

    @classmethod
    def fixed_tensors(
        cls, config: DeloraConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        return {NORMS: ((shapes[FACTOR_A][1],), torch.float32)}

    @classmethod
    def initial_tensors(cls, config: DeloraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        return {
            FACTOR_A: site.new(site.shapes[FACTOR_A], linear_),
            FACTOR_B: site.new(site.shapes[FACTOR_B], None if config.init_weights else linear_),
            BOUND: site.new((1,)).fill_(config.lambda_at(site.path)),
        }

    def prepare(self, config: DeloraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        norms = tensors.get(NORMS)
        norms = site.base.weight().float().norm(dim=0) if norms is None else norms
        self.register_buffer(NORMS, norms.to(tensors[FACTOR_A].device, torch.float32))

    rank: int = axis_size(FACTOR_A)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A with the norms in its columns and the strengths in its rows, (r, in), and B, (out, r)."""
        norms = self.tensor(NORMS)
        second: Tensor = self.tensor(FACTOR_B)

        def first(rows: Tensor, columns: Tensor, bound: Tensor) -> Tensor:
            lengths = rows.norm(dim=1).clamp_min(_LEAST_NORM) * columns.norm(dim=0).clamp_min(_LEAST_NORM)
            strengths: Tensor = bound / len(rows) / lengths
            return rows * strengths[:, None] * norms.to(rows)

        return keeping_inputs(first, self.tensor(FACTOR_A), second, self.tensor(BOUND)), second
