"""SHiRA: sparse high-rank adapters (Bhardwaj et al. 2024, arXiv:2406.13175).

    y = (W + Δ) x        Δ: zero but for r (in + out) trained entries at random positions

It trains as many numbers as a LoRA of rank r, at positions all over the weight. A file contains the positions, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, HasFixedTensors, ReplacesCall, Rescales, Shape
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta, in_one_product, with_entries
from nbpeft.errors import ConfigError

WEIGHT, INDICES = "shira_weight", "shira_indices"

MaskFunction = Callable[..., Tensor]
"""(layer, r, random_seed=…) -> mask, (out, in), of r (in + out) ones."""


@dataclass
class ShiraConfig(HasFanInFanOut):
    """Config of SHiRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: the number of trained entries of a weight is that of a LoRA of this rank.
        mask_type: 'random' draws the positions; with another name, set ``mask_fn`` of the config, which is not saved.
        random_seed: seed of the positions; None for a fixed seed.
        init_weights: start at the base model; False for random entries.
    """

    r: int = field(default=32)
    mask_type: str = field(default="random")
    random_seed: int | None = field(default=None)
    init_weights: bool = field(default=True)

    seeds: ClassVar[tuple[str, ...]] = ("random_seed",)
    method_type: ClassVar[str] = "SHIRA"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    counts: ClassVar[tuple[str, ...]] = ("r",)
    value_fields: ClassVar[tuple[str, ...]] = ("init_weights",)
    scaling: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: MaskFunction | None = random_mask if self.mask_type == "random" else None


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask of zeros and r (in + out) ones, shaped like the weight, drawn as PEFT draws it.

    Args:
        base_layer: has ``out_features`` and ``in_features``.
        r: how many ones.
        random_seed: seed of the places.
        **kwargs: not used.
    """
    shape = int(base_layer.out_features), int(base_layer.in_features)  # type: ignore[arg-type]
    return _mask(shape, _drawn_places(shape, r, random_seed))


def _drawn_places(shape: tuple[int, int], r: int, seed: int | None) -> Tensor:
    """Places in the flat weight, on the CPU."""
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(shape[0] * shape[1], generator=generator)[: r * sum(shape)]


def _mask(shape: tuple[int, int], places: Tensor) -> Tensor:
    mask = torch.zeros(shape[0] * shape[1])
    mask[places] = 1
    return mask.view(shape)


@register(
    ShiraConfig,
    label="SHiRA",
    listing=Listing(
        when="several adapters that should not interfere: each trains few entries of a weight",
        paper="arXiv:2406.13175",
    ),
    default_targets=lambda model_type: ["q_proj", "v_proj"] if model_type == "phi" else usual_targets(model_type),
    sample_configs={"r2": {"r": 2}, "seeded": {"r": 3, "random_seed": 7}},
)
class Shira(WeightDelta, Rescales, ReplacesCall, HasFixedTensors):
    """The entries of one layer, (n,), and their places, (2, n): rows and columns."""

    peft: ClassVar[PeftNames] = PeftNames(
        "shira_weight", "r scaling shira_indices", attributes={"r": "rank", INDICES: INDICES}
    )
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "rank": "r"}

    rank: int

    @classmethod
    def parameter_shapes(cls, config: ShiraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The entries, (r (in + out),)."""
        check_linear("SHiRA", path, kind)
        in_features, out_features = kind.features(module)
        count = config.r * (in_features + out_features)
        if count > in_features * out_features:
            raise ConfigError(
                f"{path}: r = {config.r} trains {count:,} entries, more than its weight has, {out_features} x "
                f"{in_features}; lower it",
                path=path,
            )
        return {WEIGHT: (count,)}

    @classmethod
    def fixed_tensors(
        cls, config: ShiraConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        return {INDICES: ((2, *shapes[WEIGHT]), torch.int32)}

    @classmethod
    def initial_tensors(cls, config: ShiraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        return {WEIGHT: site.new(site.shapes[WEIGHT], None if config.init_weights else normal_)}

    def prepare(self, config: ShiraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        places = _checked(tensors[INDICES], site) if INDICES in tensors else _new_places(config, site)
        self.register_buffer(INDICES, places.to(tensors[WEIGHT].device, torch.int32))

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        entries = parameters[0]
        return self._added(entries.new_zeros(base.out_features, base.in_features), entries)

    def _added(self, weight: Tensor, entries: Tensor) -> Tensor:
        """A weight, (out, in), with the entries added at their places."""
        return with_entries(weight, self.tensor(INDICES), entries * self.scaling)

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """``(W + Δ) x + b``, in one product, where the weight is not quantized."""
        return in_one_product(x, base, self._added, self.tensors)


def _new_places(config: ShiraConfig, site: AdapterSite) -> Tensor:
    """Rows and columns of the ones of a mask, (2, n), row by row.

    Raises:
        ConfigError: there is nothing to make a mask with, or it has another shape or number of ones.
    """
    shape = site.base.out_features, site.base.in_features
    if config.mask_fn is random_mask:
        flat = _drawn_places(shape, config.r, config.random_seed).sort().values
        return torch.stack([flat // shape[1], flat % shape[1]])
    if config.mask_fn is None:
        raise ConfigError(
            f"mask_type={config.mask_type!r:.60} has no function here: set config.mask_fn to one that makes the mask "
            "of a layer, or take mask_type='random'",
            field="mask_type",
        )
    seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    mask = config.mask_fn(site.base.module, config.r, **seed)
    places = (mask == 1).nonzero().T
    if tuple(mask.shape) != shape or places.shape[1] != site.shapes[WEIGHT][0]:
        raise ConfigError(
            f"{site.path}: config.mask_fn must give a mask of shape {shape} with {site.shapes[WEIGHT][0]} ones, not "
            f"{tuple(mask.shape)} with {places.shape[1]}",
            path=site.path,
        )
    return places


def _checked(indices: Tensor, site: AdapterSite) -> Tensor:
    """Loaded places.

    Raises:
        ConfigError: one is not in the weight.
    """
    limits = torch.tensor([[site.base.out_features], [site.base.in_features]], device=indices.device)
    if indices.numel() and not bool(((indices >= 0) & (indices < limits)).all()):
        raise ConfigError(f"{site.path}: {INDICES} has places outside of its weight", path=site.path)
    return indices
