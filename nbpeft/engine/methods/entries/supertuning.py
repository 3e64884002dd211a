"""Super-Tuning: the entries of a weight of largest magnitude are trained (arXiv:2607.09287).

    y = (W + Δ) x + α/r B A x        Δ: zero but for the trained entries, where |W| is largest

With a rank ("Supra"), the product of two factors is added as in LoRA. A file contains the positions of the entries, or
they are recomputed from the weights; if magnitudes are equal, another device or version of torch may choose others.
For a quantized weight PEFT uses the magnitudes of the packed codes; here those of the dequantized weight are used.
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
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, HasFixedTensors, ReplacesCall, Rescales, Shape
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import stored
from nbpeft.engine.contract.initial_draws import linear_, normal_
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import WeightDelta, apply_delta, in_one_product, with_entries
from nbpeft.engine.kernels.numerics import FLOATS, compute_dtype
from nbpeft.errors import ConfigError, shown

VALUES, INDICES = "supertuning_values", "supertuning_indices"
FACTOR_A, FACTOR_B = "supertuning_lora_A", "supertuning_lora_B"


@dataclass
class SupertuningConfig(LayersConfig):
    """Config of Super-Tuning. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        sparsity: share of a weight's entries that is not trained.
        select_top: train the entries of largest magnitude; False for the smallest.
        r: rank of additional LoRA factors; None for no factors.
        lora_alpha: the factors' product is multiplied by lora_alpha / r; by default 2 r.
        lora_dropout: dropout probability of the factors' input.
        init_weights: start at the base model; False for random numbers.
        save_precomputed_indices: save the positions, too; otherwise they are recomputed from the weights.
    """

    sparsity: float = field(default=0.99)
    select_top: bool = field(default=True)
    r: int | None = field(default=None)
    lora_alpha: float | None = field(default=None)
    lora_dropout: float = field(default=0.0)
    init_weights: bool = field(default=True)
    save_precomputed_indices: bool = field(default=True)

    counts: ClassVar[tuple[str, ...]] = ("r",)
    method_type: ClassVar[str] = "SUPERTUNING"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    value_fields: ClassVar[tuple[str, ...]] = ("lora_alpha", "lora_dropout", "init_weights")
    scaling: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparsity", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 0 and less than 1, not {shown(getattr(self, name))}", field=name
                )
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("lora_alpha needs r, the rank of the factors that it scales", field="lora_alpha")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r

    @property
    def initialised_from_weight(self) -> bool:
        return not self.save_precomputed_indices

    @property
    def alpha(self) -> float:
        """The scaling of the factors; 0 without factors."""
        return float(self.lora_alpha or 0.0)


@register(
    SupertuningConfig,
    label="Super-Tuning",
    listing=Listing(
        when="like SHiRA, with entries chosen by magnitude; optionally together with LoRA",
        paper="arXiv:2607.09287",
        variant=lambda config: "" if config.r is None else "Supra",
        summary=lambda config: (
            {"trained": f"{1 - config.sparsity:.3g}"} | ({} if config.r is None else {"r": str(config.r)})
        ),
        smaller=lambda config: config.copy(sparsity=(1 + config.sparsity) / 2) if config.sparsity < 0.999 else None,
    ),
    default_targets=usual_targets,
    sample_configs={
        "super": {"sparsity": 0.9},
        "supra": {"sparsity": 0.95, "r": 2, "lora_alpha": 3.0},
        "smallest": {"sparsity": 0.9, "select_top": False, "save_precomputed_indices": False},
    },
    files=FileFormat(keys={FACTOR_A: f"{FACTOR_A}.weight", FACTOR_B: f"{FACTOR_B}.weight"}),
)
class SuperTuning(WeightDelta, Rescales, ReplacesCall, HasFixedTensors):
    """The trained entries of one layer, (n,), their places in the flat weight, (n,), and A and B, if any."""

    peft: ClassVar[PeftNames] = PeftNames(
        "supertuning_values supertuning_lora_A supertuning_lora_B",
        "supertuning_indices supertuning_rank supertuning_lora_alpha supertuning_lora_dropout",
        wrapped=(FACTOR_A, FACTOR_B),
        mappings=(VALUES, FACTOR_A, FACTOR_B),
        attributes={
            "supertuning_rank": "rank",
            "supertuning_lora_alpha": "alpha",
            INDICES: "places",
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {
        "scaling": "scaling",
        "alpha": "alpha",
        "dropout": "lora_dropout",
    }

    alpha: float
    dropout: float

    @classmethod
    def parameter_shapes(cls, config: SupertuningConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The entries, (n,), and of a rank A, (r, in), and B, (out, r)."""
        check_linear("Super-Tuning", path, kind)
        in_features, out_features = kind.features(module)
        count = int(in_features * out_features * (1 - config.sparsity))
        if count < 1:
            raise ConfigError(
                f"{path}: sparsity = {config.sparsity} leaves no entry to train of a weight of {out_features} x "
                f"{in_features}; lower it",
                path=path,
            )
        factors = {} if config.r is None else {FACTOR_A: (config.r, in_features), FACTOR_B: (out_features, config.r)}
        return {VALUES: (count,), **factors}

    @classmethod
    def fixed_tensors(
        cls, config: SupertuningConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """The places, with ``save_precomputed_indices``."""
        return {INDICES: (shapes[VALUES], torch.int32)} if config.save_precomputed_indices else {}

    @classmethod
    def initial_tensors(cls, config: SupertuningConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        return _new(config, site)

    def prepare(self, config: SupertuningConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        places = _checked(tensors[INDICES], site) if INDICES in tensors else _places(config, site)
        places = places.to(tensors[VALUES].device, torch.int32)
        self.register_buffer(INDICES, places, persistent=config.save_precomputed_indices)

    places: Tensor = stored(INDICES)  # Where the entries are in the flat weight, (n,), int32

    @property
    def rank(self) -> int:
        """The rank of the factors; 0 without."""
        return int(self.tensors[1].shape[0]) if len(self.tensors) > 1 else 0

    def entries_in(self, weight: Tensor, entries: Tensor) -> Tensor:
        """A weight with the entries added at their places; not in place."""
        return with_entries(weight, self.places, entries * self.scaling)

    def entries_alone(self, base: BaseLayer, entries: Tensor) -> Tensor:
        """Zeros, (out, in), and the entries at their places."""
        return self.entries_in(entries.new_zeros(base.out_features, base.in_features), entries)

    def delta(self, base: BaseLayer, *parameters: Tensor) -> Tensor:
        dense = self.entries_alone(base, parameters[0])
        if len(parameters) == 1:
            return dense
        first, second = parameters[1:]
        return dense + (second @ first) * (self.alpha / self.rank * self.scaling)

    def with_factors(self, x: Tensor, output: Tensor) -> Tensor:
        """``output`` plus the factors' product with ``x``, in the dtype of ``output``."""
        if not self.rank:
            return output
        first, second = self.tensors[1:]
        dtype = compute_dtype(x, first)
        hidden = F.linear(F.dropout(x.to(dtype), self.dropout, self.training), first.to(dtype))
        return output + (F.linear(hidden, second.to(dtype)) * (self.alpha / self.rank * self.scaling)).to(output.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``Δ x + α/r B A dropout(x)``."""
        found = apply_delta(x, base, lambda entries: self.entries_alone(base, entries), self.tensors[:1])
        return self.with_factors(x, found)

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """``(W + Δ) x + b`` in one product, where the weight is not quantized, and the factors'."""
        found = in_one_product(x, base, self.entries_in, self.tensors[:1])
        return None if found is None else self.with_factors(x, found)


def _new(config: SupertuningConfig, site: AdapterSite) -> dict[str, Tensor]:
    """New entries and factors, drawn in the order in which PEFT draws them."""
    made = {VALUES: site.new(site.shapes[VALUES], None if config.init_weights else normal_)}
    if config.r is None:
        return made
    # PEFT draws both factors, and then those that it keeps again.
    for name in (FACTOR_A, FACTOR_B, FACTOR_A, *(() if config.init_weights else (FACTOR_B,))):
        made[name] = site.new(site.shapes[name], linear_)
    if config.init_weights:
        made[FACTOR_B].zero_()
    return {name: made[name] for name in site.shapes}


def _places(config: SupertuningConfig, site: AdapterSite) -> Tensor:
    """Where the magnitudes of the weight are largest, or smallest, (n,)."""
    weight = site.base.weight().detach()
    magnitudes = (weight if weight.dtype in FLOATS else weight.to(torch.float32)).abs().flatten()
    return magnitudes.topk(site.shapes[VALUES][0], largest=config.select_top).indices


def _checked(places: Tensor, site: AdapterSite) -> Tensor:
    """Loaded places.

    Raises:
        ConfigError: one is not in the weight.
    """
    size = site.base.out_features * site.base.in_features
    if places.numel() and not bool(((places >= 0) & (places < size)).all()):
        raise ConfigError(
            f"{site.path}: {INDICES} has places outside of its weight of {size:,} entries", path=site.path
        )
    return places
