"""VeRA: two vectors a layer around random projections that all layers share (Kopiczko et al. 2023, arXiv:2310.11454).

y = W x + b ∘ B (d ∘ (A x))        A: (r, in), B: (out, r), frozen, the same for all layers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.method_records import FileFormat, Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.engine.methods.projections.projected_vectors import ProjectedVectors, Projections, VectorsConfig


@dataclass
class VeraConfig(VectorsConfig):
    """Config of VeRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        vera_dropout: dropout probability of the adapter's input, from 0 to 1.
    """

    vera_dropout: float = field(default=0.0)

    method_type: ClassVar[str] = "VERA"
    rate_factor: ClassVar[float] = 40
    shares: ClassVar[tuple[str, ...]] = ("vera_dropout",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none", "all", "vera_only")}

    @property
    def dropout(self) -> float:
        """Dropout probability of the adapter's input."""
        return self.vera_dropout


class VeraProjections(Projections):
    """A, (r, largest in), and B, (largest out, r): frozen, and drawn from a seed."""

    names: ClassVar[tuple[str, str]] = ("vera_A", "vera_B")


@register(
    VeraConfig,
    peft_type="VERA",
    label="VeRA",
    listing=Listing(
        when="very many adapters of one model: two vectors per layer in each file",
        paper="arXiv:2310.11454",
        summary=lambda config: {"r": str(config.r)},
        smaller=lambda config: config.copy(r=config.r // 2) if config.r > 1 else None,
    ),
    default_targets=lambda model_type: ["q_proj", "v_proj"] if model_type == "phi" else usual_targets(model_type),
    sample_configs={"r8": {"r": 8}, "drawn": {"r": 5, "save_projection": False}},
    files=FileFormat(prefix="vera_lambda_"),
    shares=SharedTensors(state=VeraProjections),
)
class Vera(ProjectedVectors, ConvertsToLora):
    """The two vectors of one layer: b, over its outputs, and d, between the projections."""

    names: ClassVar[tuple[str, str]] = ("vera_lambda_b", "vera_lambda_d")
    between: ClassVar[type[Projections]] = VeraProjections
    identity: ClassVar[Mapping[str, float]] = {"vera_lambda_b": 0.0}
    peft: ClassVar[PeftNames] = PeftNames(
        "vera_lambda_b vera_lambda_d",
        "vera_A vera_B vera_dropout r",
        attributes={name: f"projections.{name}" for name in VeraProjections.names},
    )

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``b ∘ B (d ∘ (A dropout(x)))``; see ``Adapter``."""
        A, B, d, b = self.parts(base)  # (r, in), (out, r), (r,), (out,)
        dtype = compute_dtype(x, b)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        hidden = F.linear(dropped, A.to(dtype)) * d.to(dtype)
        return F.linear(hidden, B.to(dtype)) * b.to(dtype)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``(b ∘ B) (d ∘ A)``; see ``Adapter``."""
        A, B, d, b = self.parts(base)
        return (B * b[:, None]) @ (A * d[:, None])

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """``d ∘ A`` and ``b ∘ B``; see ``ConvertsToLora``."""
        A, B, d, b = self.parts(base)
        return LowRankDelta(A * d[:, None], B * b[:, None], 1.0)
