"""FourierFT: some frequencies of the change of a weight (Gao et al. 2024, arXiv:2405.03003).

    Δ = scaling Re(F⁻¹(E))        E: (out, in), zero but for n trained entries at random positions

The positions are drawn from a seed, so a file contains only n numbers per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.random_numbers import drawn_places
from nbpeft.engine.config.config_checks import check_count, check_frequencies, check_linear, check_number
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.config.targets import usual_unfused_targets
from nbpeft.engine.contract.adapter import AdapterSite, Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta
from nbpeft.engine.kernels.numerics import composes
from nbpeft.errors import ConfigError

SPECTRUM = "fourierft_spectrum"


@dataclass
class FourierFTConfig(LayersConfig):
    """Config of FourierFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        n_frequency: number of trained frequencies of a layer.
        scaling: factor on the delta.
        random_loc_seed: seed of the positions of the frequencies.
        fan_in_fan_out: ignored, accepted as in PEFT: the layout is known from the layer.
        bias: which biases of the model are also trained.
        n_frequency_pattern: layer name or pattern -> another n_frequency.
        init_weights: start at the base model; False for random numbers.
    """

    n_frequency: int = field(default=1000)
    scaling: float = field(default=150.0)
    random_loc_seed: int = field(default=777)
    fan_in_fan_out: bool = field(default=False)
    bias: str = field(default="none")
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = field(default=False)

    method_type: ClassVar[str] = "FOURIERFT"
    counts: ClassVar[tuple[str, ...]] = ("n_frequency",)
    pattern_fields: ClassVar[Mapping[str, Callable[..., None]]] = {"n_frequency_pattern": check_count}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none", "all", "fourier_only")}
    value_fields: ClassVar[tuple[str, ...]] = ("scaling", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scaling", self.scaling)
        if not 0 <= self.random_loc_seed < 2**63:
            raise ConfigError(
                f"random_loc_seed must be a whole number from 0 to 2**63 - 1, not {self.random_loc_seed:.3g}",
                field="random_loc_seed",
            )

    def frequencies_at(self, path: str) -> int:
        """The number of frequencies at a module path."""
        return int(pattern_table(self, "n_frequency_pattern").get(path, self.n_frequency))


@register(
    FourierFTConfig,
    peft_type="FOURIERFT",
    label="FourierFT",
    listing=Listing(
        when="very small files: a fixed number of values per layer, whatever its size",
        paper="arXiv:2405.03003",
        summary=lambda config: {"frequencies": str(config.n_frequency)},
        smaller=lambda config: config.copy(n_frequency=config.n_frequency // 2) if config.n_frequency > 1 else None,
    ),
    default_targets=usual_unfused_targets,
    sample_configs={"n20": {"n_frequency": 20, "init_weights": True, "scaling": 50.0}},
)
class FourierFT(WeightDelta, Rescales):
    """The numbers of one layer, (n,)."""

    peft: ClassVar[PeftNames] = PeftNames(
        "fourierft_spectrum",
        "fourierft_n_frequency fourierft_scaling fourierft_random_loc_seed indices",
        layer_prefix="FourierFT",
        attributes={
            "fourierft_n_frequency": "count",
            "fourierft_scaling": "scaling",
            "fourierft_random_loc_seed": "seed",
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "seed": "random_loc_seed"}

    seed: int

    @classmethod
    def parameter_shapes(cls, config: FourierFTConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The numbers, (n,)."""
        check_linear("FourierFT", path, kind)
        count = config.frequencies_at(path)
        check_frequencies(count, path, kind.features(module))
        return {SPECTRUM: (count,)}

    @classmethod
    def initial_tensors(cls, config: FourierFTConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        spectrum = site.new(site.shapes[SPECTRUM], normal_)
        return {SPECTRUM: spectrum.zero_() if config.init_weights else spectrum}

    @property
    def count(self) -> int:
        """Number of frequencies."""
        return int(self.tensors[0].shape[0])

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """The inverse Fourier transform of the numbers at their positions."""
        spectrum = parameters[0]
        shape = base.out_features, base.in_features
        places = drawn_places(shape[0] * shape[1], self.count, self.seed).to(spectrum.device)
        wide = torch.promote_types(spectrum.dtype, torch.float32)  # there is no transform of half precision on a CPU
        dense = torch.zeros(shape[0] * shape[1], device=spectrum.device, dtype=wide)
        dense = dense.index_put((places,), spectrum.to(wide)).view(shape)
        made = _real_inverse(dense) if composes() else _RealInverse.apply(dense)  # type: ignore[no-untyped-call]
        return (made * self.scaling).to(spectrum.dtype)


def _real_inverse(dense: Tensor) -> Tensor:
    """``Re(F⁻¹(E))`` of a real E (rows, columns), from half of its spectrum, which determines the other half."""
    rows, columns = dense.shape
    half = torch.fft.rfft2(dense).real
    rest = half[:, 1 : (columns + 1) // 2].flip(0, 1).roll(1, 0)
    return torch.cat([half, rest], 1) / (rows * columns)


class _RealInverse(torch.autograd.Function):
    """The same; a sum of cosines is its own transpose, so backward is the same transform."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor) -> Tensor:
        return _real_inverse(dense)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _real_inverse(gradients[0])
