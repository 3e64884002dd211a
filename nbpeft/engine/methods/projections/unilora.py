"""Uni-LoRA: every entry of all low-rank factors is one of few trained numbers (Li et al. 2025, arXiv:2506.00799).

    y = W x + B A x        A_ij = θ_k / √n_k, k drawn for each entry; B likewise;  n_k: how often k was drawn

The draws are balanced: every number is used for equally many entries of the model, or one more. They are determined by
a seed and the sizes of the layers, so a file contains only θ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear, check_number
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, HasFixedTensors, Shape, SharedSite, SharedState
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import axis_size, stored
from nbpeft.engine.contract.initial_draws import Fill, normal_, skip, uniform_
from nbpeft.engine.contract.method_records import Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import ComputedFactors
from nbpeft.errors import ConfigError

THETA = "unilora_theta_d"
INDICES_A, INDICES_B = "unilora_indices_A", "unilora_indices_B"
SCALES_A, SCALES_B = "unilora_scales_A", "unilora_scales_B"
_BUFFERS = (INDICES_A, INDICES_B, SCALES_A, SCALES_B)


@dataclass
class UniLoraConfig(HasFanInFanOut, TrainsBiases):
    """Config of Uni-LoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of the two factors.
        proj_seed: seed of the draws.
        theta_d_length: number of trained values of the whole model.
        unilora_dropout: dropout probability of the adapter's input, from 0 to 1.
        init_theta_d_bound: initial values are uniform between minus and plus this value.
        init_weights: False for initial values from a normal distribution.
        save_indices: save the drawn indices and scales too; otherwise they are drawn again from the seed.
    """

    r: int = field(default=4)
    proj_seed: int = field(default=42)
    theta_d_length: int = field(default=256)
    unilora_dropout: float = field(default=0.0)
    init_theta_d_bound: float = field(default=0.02)
    init_weights: bool = field(default=True)
    save_indices: bool = field(default=False)

    method_type: ClassVar[str] = "UNILORA"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("r", "theta_d_length")
    shares: ClassVar[tuple[str, ...]] = ("unilora_dropout",)
    seeds: ClassVar[tuple[str, ...]] = ("proj_seed",)
    value_fields: ClassVar[tuple[str, ...]] = ("unilora_dropout", "init_theta_d_bound", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("init_theta_d_bound", self.init_theta_d_bound)
        if self.init_theta_d_bound <= 0:
            raise ConfigError(
                f"init_theta_d_bound must be positive, not {self.init_theta_d_bound:g}: nothing is learned from zeros",
                field="init_theta_d_bound",
            )


class UniVector(SharedState):
    """θ, (theta_d_length,), which is trained, and the indices of the numbers that each layer uses."""

    in_layers: ClassVar[bool] = True

    config: UniLoraConfig
    features: Mapping[str, tuple[int, int]]
    places: Mapping[str, int]
    total: int
    drawn: Tensor | None = None
    scales: Tensor | None = None

    theta: Tensor = stored(THETA)

    @classmethod
    def tensor_shapes(cls, config: UniLoraConfig, features: Mapping[str, tuple[int, int]]) -> Shapes:
        """Shape of θ."""
        return {THETA: (config.theta_d_length,)}

    @classmethod
    def initial_tensors(cls, config: UniLoraConfig, site: SharedSite) -> Mapping[str, Tensor]:
        bound = config.init_theta_d_bound
        fill: Fill = partial(uniform_, bound=bound) if config.init_weights else normal_
        return {THETA: site.new(site.shapes[THETA], fill)}

    @classmethod
    def create(cls, config: UniLoraConfig, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        made = super().create(config, site, tensors)
        made.bind(config=config)
        return made

    def place(self, layers: Mapping[str, BaseLayer]) -> None:
        features = {path: (base.in_features, base.out_features) for path, base in layers.items()}
        sizes = [sum(pair) * self.config.r for pair in features.values()]
        *starts, total = itertools.accumulate(sizes, initial=0)
        places = dict(zip(features, starts, strict=True))
        self.bind(features=features, places=places, total=total, drawn=None, scales=None)

    def indices_of(self, path: str) -> tuple[Tensor, Tensor]:
        """Index in θ of each entry of a layer's A, (r, in), and B, (out, r); int64, on the CPU."""
        if self.drawn is None:
            drawn = _balanced(self.total, self.config.theta_d_length, self.config.proj_seed)
            self.bind(drawn=torch.as_tensor(drawn))
        assert self.drawn is not None
        rank, start, (in_features, out_features) = self.config.r, self.places[path], self.features[path]
        end = start + rank * (in_features + out_features)
        own = self.drawn[start:end].clone()
        if end == self.total:
            self.bind(drawn=None)  # as large as all factors together
        return own[: rank * in_features].view(rank, in_features), own[rank * in_features :].view(out_features, rank)

    def scales_of(self, indices: Tensor) -> Tensor:
        """Factors on the entries: one over the root of how often their value was drawn, float32."""
        if self.scales is None:
            counts = torch.as_tensor(_draws(self.total, self.config.theta_d_length, self.config.proj_seed)[0])
            self.bind(scales=counts.clamp_min(1).float().rsqrt())
        assert self.scales is not None
        return self.scales[indices]


def _draws(total: int, length: int, seed: int) -> tuple[Any, Any, Any]:
    """How often each number is drawn; the numbers that are drawn once more; and the generator after these draws."""
    generator = np.random.default_rng(seed)
    more, counts = total % length, np.full(length, total // length, dtype=np.int64)
    extras = generator.choice(length, size=more, replace=False) if more else np.empty(0, dtype=np.int64)
    counts[extras] += 1
    return counts, extras, generator


def _balanced(total: int, length: int, seed: int) -> Any:
    """A number for each of so many entries, drawn as PEFT draws them."""
    _, extras, generator = _draws(total, length, seed)
    drawn = np.concatenate([np.repeat(np.arange(length), total // length), extras])
    generator.shuffle(drawn)
    return drawn


def _of_length(config: UniLoraConfig, length: int) -> UniLoraConfig | None:
    return config.copy(theta_d_length=length) if length else None


@register(
    UniLoraConfig,
    label="Uni-LoRA",
    listing=Listing(
        when="tiny files: some hundred parameters for all low-rank factors of a model",
        paper="arXiv:2506.00799",
        summary=lambda config: {"r": str(config.r), "d": str(config.theta_d_length)},
        smaller=lambda config: _of_length(config, config.theta_d_length // 2),
    ),
    default_targets=usual_targets,
    sample_configs={
        "d16": {"r": 3, "theta_d_length": 16, "init_theta_d_bound": 1e-4},
        "saved": {"r": 2, "theta_d_length": 20, "init_theta_d_bound": 1e-4, "save_indices": True},
    },
    shares=SharedTensors(state=UniVector),
)
class UniLora(ComputedFactors, HasFixedTensors):
    """The index and the scale of the number behind each entry of a layer's factors A, (r, in), and B, (out, r)."""

    peft: ClassVar[PeftNames] = PeftNames(
        "unilora_theta_d",
        "r unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B unilora_dropout",
        attributes={
            "r": "rank",
            THETA: f"vector.{THETA}",
            **{name: name for name in _BUFFERS},
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "unilora_dropout", "saves_indices": "save_indices"}

    vector: UniVector
    saves_indices: bool

    @classmethod
    def parameter_shapes(cls, config: UniLoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Empty: the trained tensor is shared."""
        check_linear("Uni-LoRA", path, kind)
        return {}

    @classmethod
    def fixed_tensors(
        cls, config: UniLoraConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """The indices and scales, where the config asks for it."""
        if not config.save_indices:
            return {}
        in_features, out_features = kind.features(module)
        first, second = (config.r, in_features), (out_features, config.r)
        indices: dict[str, tuple[Shape, torch.dtype]] = {
            INDICES_A: (first, torch.int64),
            INDICES_B: (second, torch.int64),
        }
        return {**indices, SCALES_A: (first, torch.float32), SCALES_B: (second, torch.float32)}

    @classmethod
    def unsaved_elements(cls, config: UniLoraConfig, module: nn.Module, kind: LayerKind) -> int:
        """Number of indices and scales, without ``save_indices``."""
        return 0 if config.save_indices else 2 * config.r * sum(kind.features(module))

    @classmethod
    def create(cls, config: UniLoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded indices and scales or draws them."""
        assert isinstance(site.shared, UniVector)
        given = dict(tensors or {})
        if not given.keys() >= set(_BUFFERS):
            indices = site.shared.indices_of(site.path)
            if tensors is None:  # PEFT draws indices, which it replaces
                for shape in ((config.r, site.base.in_features), (site.base.out_features, config.r)):
                    skip(partial(torch.Tensor.random_, to=config.theta_d_length), site.device, shape)
            dtype = site.base.dtype if site.base.dtype.itemsize > 1 else site.dtype
            scales = [site.shared.scales_of(one).to(dtype) for one in indices]
            device = site.shared.theta.device if site.base.device.type == "meta" else site.base.device
            given = {name: one.to(device) for name, one in zip(_BUFFERS, (*indices, *scales), strict=True)}
        elif any(not bool(((given[name] >= 0) & (given[name] < config.theta_d_length)).all()) for name in _BUFFERS[:2]):
            raise ConfigError(
                f"{site.path}: indices of the file are not those of {config.theta_d_length} numbers (theta_d_length)",
                path=site.path,
            )
        made = super().create(config, site, given)
        for name in _BUFFERS:
            made.register_buffer(name, given[name], persistent=config.save_indices)
        made.bind(vector=site.shared)
        return made

    rank: int = axis_size(INDICES_A)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (r, in), and B, (out, r), on the device of the layer."""
        indices_A, indices_B, scales_A, scales_B = (self.tensor(name) for name in _BUFFERS)
        theta = self.vector.theta.to(indices_A.device)
        return theta[indices_A] * scales_A.to(theta.dtype), theta[indices_B] * scales_B.to(theta.dtype)

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in _BUFFERS} if self.saves_indices else {}

    def reset_(self, base: BaseLayer) -> None:
        """Sets θ to zero, which all layers share."""
        self.vector.theta.detach().zero_()
