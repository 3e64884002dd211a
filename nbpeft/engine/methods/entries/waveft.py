"""WaveFT: some coefficients of the wavelet transform of a weight's change (Bilican et al. 2025, arXiv:2505.12532).

    Δ = scaling crop(R [C_a C_v; C_h C_d] Rᵀ)        C: zero but for n trained entries at random positions

R is one level of the inverse wavelet transform. With a filter of length f, C has f - 2 more rows and columns than the
weight, and Δ is the middle part of the transform. Without ``use_idwt`` the trained entries are entries of Δ itself.

The filters are computed: Daubechies filters are the spectral factor of minimum phase, symlets use other zeros, and
coiflets solve their equations. PEFT also accepts the names of filters that it does not have (db11 and above, sym11
and above) and fails in the first call. Its coif4 and coif5 are no wavelets, because they are not orthogonal to their
shifts. Here they are correct, so the output of an adapter that PEFT trained with one of these two differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nbpeft.engine.config.targets import usual_unfused_targets
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.methods.entries.placed import Placed, PlacedConfig, fewer, widest
from nbpeft.errors import ConfigError, shown

SPECTRUM = "waveft_spectrum"
_DEVIATION = 0.01
"""Standard deviation of random coefficients."""

_OUTER_ZEROS = (0, 0, 2, 2, 3, 4, 10, 6, 11, 12, 21, 49, 52, 28, 53, 113, 203, 92, 309)
"""Which zeros of sym2, sym3, … lie outside of the unit circle: one bit for each real one or pair of complex ones, those
of real ones first, those of complex ones by their real part inside."""

_COIFLETS = (
    (-0.29093047805010579, -0.06262291254316797),
    (0.26219738341125825, 0.04366779259659914, -0.029171341934576514, -0.011528791128325552),
    (
        *(-0.24278482332037131, -0.032243914646854915, 0.044263613170710796, 0.016551572520753038),
        *(-0.0045429313604082564, -0.0022143854846254575),
    ),
    (
        *(0.22843235904947276, 0.024791677383535035, -0.05316011928883867, -0.019045150016116521),
        *(0.009282987722890541, 0.0043391831765116139, -0.00083446987264787217, -0.00045695767411029675),
    ),
    (
        *(-0.21717182675711386, -0.019515414011753302, 0.058855175342852878, 0.02036982893806103),
        *(-0.013458925727229226, -0.0060827886067191531, 0.0021267744707938775, 0.0011272390525973391),
        *(-0.00016627707056177495, -9.8345063554743215e-5),
    ),
)
"""Solutions of the quadratic equations of coif1, coif2, …; see ``_coiflet``."""

_FAMILIES = {"db": range(1, 39), "sym": range(2, 21), "coif": range(1, 6)}


@dataclass
class WaveFTConfig(PlacedConfig):
    """Config of WaveFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        n_frequency: number of trained coefficients of a layer.
        wavelet_family: which filter: db1 (Haar) to db38, sym2 to sym20, coif1 to coif5.
        use_idwt: transform the coefficients; False to train entries of the weight themselves, which is faster.
        proportional_parameters: give a layer a number in proportion to the size of its weight, on average n_frequency;
            n_frequency_pattern is then ignored.
        init_weights: start at the base model; False for small random numbers.
    """

    n_frequency: int = field(default=2592)
    scaling: float = field(default=25.0)
    wavelet_family: str = field(default="db1")
    use_idwt: bool = field(default=True)
    proportional_parameters: bool = field(default=False)
    init_weights: bool = field(default=True)

    counts_at: ClassVar[Mapping[str, int]] = {}
    """Path -> number of coefficients of a layer, where ``proportional_parameters`` shares them out."""
    method_type: ClassVar[str] = "WAVEFT"
    value_fields: ClassVar[tuple[str, ...]] = ("scaling", "wavelet_family", "use_idwt", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        _parts_of(self.wavelet_family)

    def fill_in_layers(self, features: Mapping[str, tuple[int, int]]) -> bool:
        """Distributes the coefficients over the layers by size (``proportional_parameters``)."""
        if not self.proportional_parameters:
            return False
        sizes = {path: taken * given for path, (taken, given) in features.items()}
        whole, budget = sum(sizes.values()), self.n_frequency * len(sizes)
        self.set_derived(counts_at={path: max(1, round(size / whole * budget)) for path, size in sizes.items()})
        return True

    def frequencies_at(self, path: str) -> int:
        """The number of coefficients at a module path; 1 before they are distributed over the layers."""
        if self.proportional_parameters:
            return int(self.counts_at.get(path, 1))
        return super().frequencies_at(path)

    @property
    def taps(self) -> tuple[float, ...]:
        """The filter of the wavelet."""
        return scaling_filter(self.wavelet_family)


def _parts_of(name: str) -> tuple[str, int]:
    """Family and order of a wavelet.

    Raises:
        ConfigError: there is no wavelet of that name.
    """
    match = re.fullmatch(r"(db|sym|coif)([1-9]\d?)", name)
    if match is None or int(match[2]) not in _FAMILIES[match[1]]:
        ranges = ", ".join(f"{family}{orders[0]} to {family}{orders[-1]}" for family, orders in _FAMILIES.items())
        raise ConfigError(f"wavelet_family must be one of {ranges}, not {shown(name)}", field="wavelet_family")
    return match[1], int(match[2])


@lru_cache(maxsize=8)
def scaling_filter(name: str) -> tuple[float, ...]:
    """The low-pass filter of an orthogonal wavelet, of even length, whose sum is the root of two.

    Args:
        name: ``db1`` to ``db38``, ``sym2`` to ``sym20``, ``coif1`` to ``coif5``.
    """
    family, order = _parts_of(name)
    make: Callable[[int], NDArray[np.float64]] = {"db": _daubechies, "sym": _symlet, "coif": _coiflet}[family]
    return tuple(make(order).tolist())


_ANGLES = np.arange(4096) * (2 * np.pi / 4096)
_DELAYS = np.exp(-1j * _ANGLES)


def _flat_part(order: int) -> list[float]:
    """P(y) in ``|H|² = 2 (1 - y)^order P(y)``, y = sin²(ω / 2), lowest power first (Daubechies 1992, 6.1.12)."""
    return [float(math.comb(order - 1 + power, power)) for power in range(order)]  # some exceed 64-bit integers


def _from_factor(order: int, factor: NDArray[np.complex128]) -> NDArray[np.float64]:
    """The filter with so many zeros at ω = π whose other factor is known at each angle."""
    response = math.sqrt(2) * ((1 + _DELAYS) / 2) ** order * factor
    return np.fft.ifft(response).real[: 2 * order]


def _daubechies(order: int) -> NDArray[np.float64]:
    """The factor of minimum phase of P, from its cepstrum: P has no zeros on the circle."""
    squared = np.polyval(_flat_part(order)[::-1], np.sin(_ANGLES / 2) ** 2)
    cepstrum, half = np.fft.ifft(np.log(squared) / 2).real, len(_ANGLES) // 2
    cepstrum[1:half] *= 2
    cepstrum[half + 1 :] = 0
    return _from_factor(order, np.exp(np.fft.fft(cepstrum)))


def _symlet(order: int) -> NDArray[np.float64]:
    """Some of the zeros of P outside of the circle instead of inside, so that the phase is nearly linear."""
    powers = np.array(_flat_part(order)) / 4.0 ** np.arange(order)
    roots = np.roots(powers[::-1]).astype(complex)
    for _ in range(3):  # the companion matrix alone leaves few digits
        roots = roots - np.polyval(powers[::-1], roots) / np.polyval(np.polyder(powers[::-1]), roots)
    roots = roots[roots.imag > -1e-9] / 4
    zeros = 1 - 2 * roots + 2 * np.sqrt(roots * (roots - 1))
    zeros = np.where(abs(zeros) < 1, zeros, 1 / zeros)
    is_real = abs(roots.imag) < 1e-9
    factor = np.ones_like(_DELAYS)
    for bit, index in enumerate(np.lexsort((zeros.real, ~is_real))):
        zero = 1 / zeros[index] if _OUTER_ZEROS[order - 2] >> bit & 1 else zeros[index]
        for one in [zero.real] if is_real[index] else [zero, zero.conjugate()]:
            factor = factor * (1 - one * _DELAYS) / (1 - one)
    return _from_factor(order, factor)


def _coiflet(order: int) -> NDArray[np.float64]:
    """A filter of length 6 K, K the order: 2 K moments of the wavelet vanish, and 2 K - 1 of the scaling function.

    ``H = cos^2K(ω/2) (Σ_{k<K} C(K-1+k, k) sin^2k(ω/2) + sin^2K(ω/2) Σ_n f_n e^{-inω})`` has those moments for any f
    (Daubechies 1993); the f at hand make it orthogonal.
    """
    width, middle = 6 * order, 2 * order
    squared_sine, power, flat = np.array([-0.25, 0.5, -0.25]), np.ones(1), np.zeros(2 * order - 1)
    for index, count in enumerate(_flat_part(order)):
        flat[order - 1 - index : order + index] += count * power
        power = np.convolve(power, squared_sine)
    binomials = np.array([math.comb(middle, index) for index in range(middle + 1)]) / 4.0**order
    fixed = math.sqrt(2) * np.convolve(binomials, flat)
    found = np.zeros(width)
    found[1 : 1 + len(fixed)] = fixed
    free = np.zeros(2 * middle + 1)
    free[::2] = binomials * (-1.0) ** np.arange(middle + 1)
    for start, factor in enumerate(_COIFLETS[order - 1]):
        found[start : start + len(free)] += factor * free
    return found


@register(
    WaveFTConfig,
    label="WaveFT",
    listing=Listing(
        when="like FourierFT, with localized changes: images of one subject",
        paper="arXiv:2505.12532",
        summary=lambda config: {"coefficients": str(config.n_frequency), "wavelet": config.wavelet_family},
        smaller=fewer,
    ),
    default_targets=usual_unfused_targets,
    sample_configs={
        "haar": {"n_frequency": 30},
        "sym4": {"n_frequency": 25, "wavelet_family": "sym4", "scaling": 10.0},
        "entries": {"n_frequency": 20, "use_idwt": False},
    },
)
class WaveFT(Placed):
    """The coefficients of one layer, (n,)."""

    peft: ClassVar[PeftNames] = PeftNames(
        "waveft_spectrum",
        "waveft_n_frequency waveft_scaling waveft_random_loc_seed waveft_wavelet_family waveft_indices waveft_use_idwt",
        layer_prefix="WaveFT",
        attributes={
            "waveft_n_frequency": "count",
            "waveft_scaling": "scaling",
            "waveft_random_loc_seed": "seed",
            "waveft_wavelet_family": "family",
            "waveft_use_idwt": "is_transformed",
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {
        **Placed.from_config,
        "family": "wavelet_family",
        "is_transformed": "use_idwt",
        "taps": "taps",
    }

    spectrum: ClassVar[str] = SPECTRUM

    family: str
    is_transformed: bool
    taps: tuple[float, ...]

    @classmethod
    def initial_tensors(cls, config: WaveFTConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        normal = None if config.init_weights else partial(normal_, std=_DEVIATION)
        return {SPECTRUM: site.new(site.shapes[SPECTRUM], normal)}

    @classmethod
    def config_warnings(
        cls, config: WaveFTConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]
    ) -> Iterable[str]:
        """Warns that PEFT's coif4 differs."""
        if config.wavelet_family == "coif4" and config.use_idwt:
            yield "PEFT's coif4 is not the wavelet of that name: adapters trained in PEFT compute something else here"

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        """The inverse transform of the coefficients at their positions."""
        spectrum = parameters[0]
        rows, columns = base.out_features, base.in_features
        places, wide = self.places(base), widest(spectrum.dtype)
        entries = spectrum.to(wide) * self.scaling
        if not self.is_transformed:
            dense = torch.zeros(rows * columns, device=spectrum.device, dtype=wide).index_put((places,), entries)
            return dense.view(rows, columns).to(spectrum.dtype)
        more = len(self.taps) - 2
        height, width = (size + more + (size + more) % 2 for size in (rows, columns))
        # In the middle of the larger matrix; where one more row or column makes its size even, that is the last.
        at_rows, at_columns = places // columns + (height - rows) // 2, places % columns + (width - columns) // 2
        low, high = _synthesis_filters(self.taps, entries)
        if self.count * len(self.taps) ** 2 <= rows * columns:
            half, filters = (height // 2, width // 2), torch.stack([low, high])
            along_rows = _written(at_rows % half[0], filters[at_columns // half[1]], rows)
            along_columns = _written(at_columns % half[1], filters[at_rows // half[0]], columns)
            return _sum_of_products(entries, along_rows, along_columns, (rows, columns)).to(spectrum.dtype)
        dense = torch.zeros(height, width, device=spectrum.device, dtype=wide).index_put((at_rows, at_columns), entries)
        (approximate, horizontal), (vertical, diagonal) = (part.chunk(2, dim=1) for part in dense.chunk(2, dim=0))
        first = _synthesis(approximate.T, horizontal.T, low, high)
        second = _synthesis(vertical.T, diagonal.T, low, high)
        whole = _synthesis(first.T, second.T, low, high)
        return whole[:rows, :columns].to(spectrum.dtype)


def _synthesis_filters(taps: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """The low-pass and the high-pass filter, (length,), in the dtype and on the device of a tensor."""
    high: Iterable[float] = (-tap if index % 2 else tap for index, tap in enumerate(reversed(taps)))
    return like.new_tensor(list(taps)), like.new_tensor(list(high))


def _written(at: Tensor, filters: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions that coefficients write to along one direction, and the factors, (n, taps) each; 0 outside."""
    taps = filters.shape[1]
    where = 2 * at[:, None] + torch.arange(2 - taps, 2, device=at.device)
    return where.clamp(0, size - 1), filters * ((where >= 0) & (where < size))


def _sum_of_products(
    entries: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], shape: tuple[int, int]
) -> Tensor:
    """The inverse transform of few coefficients: each adds a small block to the weight, (rows, columns)."""
    places = rows[0][:, :, None] * shape[1] + columns[0][:, None, :]
    blocks = entries[:, None, None] * rows[1][:, :, None] * columns[1][:, None, :]
    flat = entries.new_zeros(shape[0] * shape[1])
    return flat.index_put((places.flatten(),), blocks.flatten(), accumulate=True).view(shape)


def _synthesis(low_part: Tensor, high_part: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """One level of the inverse transform of rows, (rows, m) each: (rows, 2 m + 2 - length of the filters)."""
    both, filters = torch.stack([low_part, high_part], dim=1), torch.stack([low, high])[:, None]
    return F.conv_transpose1d(both, filters, stride=2, padding=len(low) - 2)[:, 0]
