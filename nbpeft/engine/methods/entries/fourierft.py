"""FourierFT: some frequencies of the change of a weight (Gao et al. 2024, arXiv:2405.03003).

    Δ = scaling Re(F⁻¹(E))        E: (out, in), zero but for n trained entries at random positions

The positions are drawn from a seed, so a file contains only n numbers per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nbpeft.engine.config.targets import usual_unfused_targets
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import composes
from nbpeft.engine.methods.entries.placed import Placed, PlacedConfig, fewer, widest

SPECTRUM = "fourierft_spectrum"


@dataclass
class FourierFTConfig(PlacedConfig):
    """Config of FourierFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        n_frequency: number of trained frequencies of a layer.
        init_weights: start at the base model; False for random numbers.
    """

    n_frequency: int = field(default=1000)
    scaling: float = field(default=150.0)
    init_weights: bool = field(default=False)

    method_type: ClassVar[str] = "FOURIERFT"
    own_biases: ClassVar[str] = "fourier_only"
    value_fields: ClassVar[tuple[str, ...]] = ("scaling", "init_weights")


@register(
    FourierFTConfig,
    label="FourierFT",
    listing=Listing(
        when="very small files: a fixed number of values per layer, whatever its size",
        paper="arXiv:2405.03003",
        summary=lambda config: {"frequencies": str(config.n_frequency)},
        smaller=fewer,
    ),
    default_targets=usual_unfused_targets,
    sample_configs={"n20": {"n_frequency": 20, "init_weights": True, "scaling": 50.0}},
)
class FourierFT(Placed):
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
    spectrum: ClassVar[str] = SPECTRUM

    @classmethod
    def initial_tensors(cls, config: FourierFTConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        spectrum = site.new(site.shapes[SPECTRUM], normal_)
        return {SPECTRUM: spectrum.zero_() if config.init_weights else spectrum}

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """The inverse Fourier transform of the numbers at their positions."""
        spectrum = parameters[0]
        shape = base.out_features, base.in_features
        wide = widest(spectrum.dtype)
        dense = torch.zeros(shape[0] * shape[1], device=spectrum.device, dtype=wide)
        dense = dense.index_put((self.places(base),), spectrum.to(wide)).view(shape)
        made = _real_inverse(dense) if composes() else _RealInverse.apply(dense)
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
