"""RoAd: rotation and scale of pairs of a layer's outputs (Liao and Monz 2024, arXiv:2409.00119).

    y = R (W x + b)        R: for each pair of outputs α [cos θ, -sin θ; sin θ, cos θ]

Outputs are paired within groups: one of the first half with one of the second half. With ``road_2`` each output of a
pair has its own α and θ, with ``road_4`` each of the four entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, TransformsOutput
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.errors import ConfigError

ANGLE, SCALE = "road_theta", "road_alpha"
_MEANS = {ANGLE: 0.0, SCALE: 1.0}
_FOR_A_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Variant -> how many angles, and scales, a pair of outputs has."""


@dataclass
class RoadConfig(LayersConfig):
    """Config of RoAd. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        variant: ``road_1``, ``road_2`` or ``road_4``: how many angles and scales a pair of outputs has.
        group_size: number of outputs of a group, an even divisor of each layer's outputs.
        init_weights: start at the base model; False for random angles and scales.
    """

    variant: str = field(default="road_1")
    group_size: int = field(default=64)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "ROAD"
    counts: ClassVar[tuple[str, ...]] = ("group_size",)
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"variant": tuple(_FOR_A_PAIR)}
    value_fields: ClassVar[tuple[str, ...]] = ("group_size", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ConfigError(f"group_size must be even, not {self.group_size}: outputs are paired", field="group_size")


@register(
    RoadConfig,
    label="RoAd",
    listing=Listing(
        when="like (IA)³, but also rotates outputs; fast steps",
        paper="arXiv:2409.00119",
        summary=lambda config: {"variant": config.variant, "group": str(config.group_size)},
    ),
    default_targets=usual_targets,
    sample_configs={
        "one": {"group_size": 4},
        "two": {"variant": "road_2", "group_size": 8},
        "four": {"variant": "road_4", "group_size": 4},
    },
)
class Road(Adapter, TransformsOutput):
    """The angles and the scales of one layer, (out / 2,), (out,) or (2 out,) each."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "road_theta road_alpha", "variant group_size", attributes={"variant": "variant", "group_size": "size"}
    )
    from_config: ClassVar[Mapping[str, str]] = {"variant": "variant", "size": "group_size"}
    identity: ClassVar[Mapping[str, float]] = _MEANS

    variant: str
    size: int

    @classmethod
    def parameter_shapes(cls, config: RoadConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        check_linear("RoAd", path, kind)
        outputs = kind.features(module)[1]
        if outputs % config.group_size:
            raise ConfigError(f"{path}: group_size = {config.group_size} must divide its {outputs} outputs", path=path)
        shape = (outputs // 2 * _FOR_A_PAIR[config.variant],)
        return {ANGLE: shape, SCALE: shape}

    @classmethod
    def initial_tensors(cls, config: RoadConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        if config.init_weights:
            return {name: site.new(site.shapes[name]) + mean for name, mean in _MEANS.items()}
        return {
            name: site.new(site.shapes[name], partial(normal_, std=0.5, mean=mean)) for name, mean in _MEANS.items()
        }

    def _changed(self, rows: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
        """``R y - y`` of vectors (…, out), in the dtype of the parameters."""
        return self._turned(rows, angle, scale) - rows.to(angle.dtype)

    def _turned(self, rows: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
        """``R y`` of vectors (…, out), in the dtype of the parameters."""
        rows = rows.to(angle.dtype)
        kept, crossed = self._columns(angle, scale)
        first, second = rows.reshape(*rows.shape[:-1], -1, 2, self.size // 2).unbind(-2)
        across = torch.stack((-second, first), -2).flatten(-3)
        return rows * kept + across * crossed

    def _columns(self, angle: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of each output and of the other output of its pair, (out,)."""
        if self.variant == "road_4":
            (own, other), (stretch, other_stretch) = (
                tensor.view(-1, 2, self.size).unbind(1) for tensor in (angle, scale)
            )
            return (stretch * own.cos()).flatten(), (other_stretch * other.sin()).flatten()
        if self.variant == "road_1":
            angle, scale = (tensor.view(-1, 1, self.size // 2).expand(-1, 2, -1).flatten() for tensor in (angle, scale))
        return scale * angle.cos(), scale * angle.sin()

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.tensor(ANGLE), self.tensor(SCALE)

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """``R y``, in the dtype of ``y``."""
        return keeping_inputs(lambda *given: self._turned(*given).to(output.dtype), output, *self._parts())

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``R y - y``, the bias of the layer included."""
        return keeping_inputs(self._changed, base_output, *self._parts())

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``R W - W``, in the dtype of the parameters."""
        return self._changed(weight.T, *self._parts()).T

    @torch.no_grad()
    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """``R b - b``."""
        return None if base.bias is None else self._changed(base.bias, *self._parts()).to(base.bias.dtype)
