"""VeRA: two vectors a layer around random projections that all layers share (Kopiczko et al. 2023, arXiv:2310.11454).

y = W x + b ∘ B (d ∘ (A x))        A: (r, in), B: (out, r), frozen, the same for all layers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.registry import register
from nbpeft.engine.methods.projections.projected_vectors import ProjectedVectors, Projections, VectorsConfig


@dataclass
class VeraConfig(VectorsConfig):
    """Config of VeRA. Field names and defaults are PEFT's; see ``LayersConfig`` for those of the layers.

    Attributes:
        vera_dropout: share of the adapter's inputs that are dropped in training, from 0 to 1.
    """

    vera_dropout: float = field(default=0.0)

    method_type: ClassVar[str] = "VERA"
    shares: ClassVar[tuple[str, ...]] = ("vera_dropout",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none", "all", "vera_only")}

    @property
    def dropout(self) -> float:
        """Share of the adapter's inputs that are dropped in training."""
        return self.vera_dropout


class VeraProjections(Projections):
    """A, (r, largest in), and B, (largest out, r): frozen, and drawn from a seed."""

    names: ClassVar[tuple[str, str]] = ("vera_A", "vera_B")


@register(
    VeraConfig,
    peft_type="VERA",
    layer_names=("vera_lambda_b vera_lambda_d", "vera_A vera_B vera_dropout r"),
    label="VeRA",
    when="very many adapters of one model: two vectors a layer in each file",
    paper="arXiv:2310.11454",
    prefix="vera_lambda_",
    default_targets=lambda model_type: ["q_proj", "v_proj"] if model_type == "phi" else usual_targets(model_type),
    summary=lambda config: {"r": str(config.r)},
    smaller=lambda config: config.copy(r=config.r // 2) if config.r > 1 else None,
    sample_configs={"r8": {"r": 8}, "drawn": {"r": 5, "save_projection": False}},
    shared=VeraProjections,
)
class Vera(ProjectedVectors):
    """The two vectors of one layer: b, over its outputs, and d, between the projections."""

    names: ClassVar[tuple[str, str]] = ("vera_lambda_b", "vera_lambda_d")
    between: ClassVar[type[Projections]] = VeraProjections
    peft_attributes: ClassVar[Mapping[str, str]] = {name: f"projections.{name}" for name in VeraProjections.names}
