"""Lily: factors that layers share, and experts among them chosen by the inputs (Zhong et al. 2024, arXiv:2407.09946).

    y = W x + s Bᵀ (A x)        B = Σ_e p_e B_e,  p = mean over all tokens of the call of softmax(R A x)

Layers of the same size that match the same name of ``target_modules`` form a group: all of them share the experts B_e,
and each ``stride_A`` consecutive layers share an A; each layer has its own router R. With a pattern, all layers of the
same size form one group. A file contains for each layer the tensors it uses.

The mean is over the batch, too, as in PEFT: the output of a row depends on the other rows and their padding and, with
a cache, only on the tokens of the current call. So the delta is not a change of the weight, and cannot be merged.

If several names match a layer, the longest is used; PEFT uses any name with which the path ends, even within a word,
and its choice differs between processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.module_paths import suffixes
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, HotSwaps, Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import linear_, skip_linear
from nbpeft.engine.contract.method_records import FileFormat, Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.errors import ConfigError

A, B, ROUTER = "lily_A", "lily_B", "lily_router"


@dataclass
class LilyConfig(LayersConfig):
    """Config of Lily. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of the factors; as layers share them, it can be two to four times that of a LoRA.
        stride_A: number of consecutive layers of a group that share one A; 1 for a separate A for each layer.
        num_B: number of experts, shared by all layers of a group; at least 2.
        scaling: factor on the delta.
        init_weights: start at the base model; False for random experts.
    """

    r: int = field(default=32)
    stride_A: int = field(default=1)
    num_B: int = field(default=2)
    scaling: float = field(default=1.0)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "LILY"
    mixes_rows: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = ("r", "stride_A", "num_B")
    value_fields: ClassVar[tuple[str, ...]] = ("scaling", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_B < 2:
            raise ConfigError(
                f"num_B must be at least 2, not {self.num_B}: the router chooses between experts", field="num_B"
            )


def _tied(config: LilyConfig, features: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
    """Which earlier layer of its group each layer shares A and the experts with; see ``SharedTensors.tied``."""
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    ties: dict[str, dict[str, str]] = {}
    for path, size in features.items():
        name = config.target_modules
        if not isinstance(name, str):
            name = next((ending for ending in suffixes(path) if ending in (config.target_modules or ())), path)
        group = groups.setdefault((name, size), [])
        place = len(group)
        group.append(path)
        owners = {A: group[place - place % config.stride_A], B: group[0]}
        ties[path] = {name: owner for name, owner in owners.items() if owner != path}
    return ties


@register(
    LilyConfig,
    label="Lily",
    listing=Listing(
        when="layers that share factors, and so afford a higher rank",
        paper="arXiv:2407.09946",
        summary=lambda config: {"r": str(config.r), "stride": str(config.stride_A), "experts": str(config.num_B)},
    ),
    default_targets=usual_targets,
    sample_configs={"own": {"r": 4}, "shared": {"r": 4, "stride_A": 2, "num_B": 3, "scaling": 2.0}},
    files=FileFormat(keys={name: f"{name}.weight" for name in (A, B, ROUTER)}),
    shares=SharedTensors(tied=_tied),
)
class Lily(Adapter, Rescales, HotSwaps):
    """A, (r, in), the experts, (num_B · r, out), and the router, (num_B, r), that one layer uses."""

    peft: ClassVar[PeftNames] = PeftNames(
        "lily_A lily_B lily_router",
        "r scaling stride_A num_B",
        wrapped=(A, B, ROUTER),
        attributes={"r": "rank", "stride_A": "stride", "num_B": "expert_count"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "stride": "stride_A"}
    identity: ClassVar[Mapping[str, float]] = {B: 0.0}

    stride: int

    @classmethod
    def parameter_shapes(cls, config: LilyConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        check_linear("Lily", path, kind)
        (inputs, outputs), rank, count = kind.features(module), config.r, config.num_B
        return {A: (rank, inputs), B: (count * rank, outputs), ROUTER: (count, rank)}

    @classmethod
    def initial_tensors(cls, config: LilyConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        skip_linear(site.device, *site.shapes.values())
        return {
            name: site.new(site.shapes[name], None if name == B and config.init_weights else linear_)
            for name in (A, ROUTER, B)
        }

    rank: int = axis_size(A)
    delta_rank = rank

    expert_count: int = axis_size(ROUTER)  # Number of experts that the router mixes

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        """The rank: rows of A."""
        return shapes[A][0]

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The mixture of the experts for ``x``."""
        parameters = (self.tensor(name).to(x.device) for name in (A, B, ROUTER))  # of a layer that is elsewhere
        return keeping_inputs(_mixed, x, *parameters, keeps_little=True) * self.scaling

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "a weight: Lily mixes its experts by the inputs of each call"

    def swap_refusal(self) -> str:
        """Why it cannot be hot-swapped: the layers of another adapter may share other tensors."""
        return "shares tensors between its layers"


def _mixed(x: Tensor, first: Tensor, experts: Tensor, router: Tensor) -> Tensor:
    """The sum of the experts' outputs, (…, out), for an input (…, in), weighted by the mean shares of its tokens."""
    dtype = compute_dtype(x, first)
    hidden = F.linear(x.to(dtype), first.to(dtype))
    shares = F.linear(hidden, router.to(dtype)).softmax(-1).view(-1, len(router)).mean(0)
    each = experts.to(dtype).reshape(len(router), -1, experts.shape[1])
    chosen = torch.einsum("e,ero->ro", shares.to(dtype), each)
    return hidden @ chosen
