"""PEANuT: a small network that reads the weight and writes its change (Zhong et al. 2024, arXiv:2410.01870).

    Δᵀ = scaling f(Wᵀ) Bᵀ        f: σ(· Aᵀ), then ``depth`` layers down and ``depth`` layers up again

Each layer on the way up adds the input of its counterpart on the way down. A is (r, out), B (out, r), others (r, r).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, HotSwaps, LowRankDelta, Rescales
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import linear_, skip_linear
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.errors import ConfigError, did_you_mean, shown

FIRST, LAST = "peanut_A", "peanut_B"
_MOST_LAYERS = 64
"""The largest depth: deeper networks are typos."""
HIDDEN = ("peanut_encoders", "peanut_decoders")
_KEYS = {f"{name}.{number}": f"{name}.{number}.weight" for name in HIDDEN for number in range(_MOST_LAYERS)}


@dataclass
class PeanutConfig(LayersConfig):
    """Config of PEANuT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: width of the network.
        depth: hidden layers on the way down, and as many on the way up; at most 64.
        act_fn: activation, by its name in ``transformers.activations.ACT2FN``; one without parameters.
        scaling: factor on the delta.
        init_weights: start at the base model; False for random numbers.
    """

    r: int = field(default=32)
    depth: int = field(default=0)
    act_fn: str = field(default="relu")
    scaling: float = field(default=1.0)
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "PEANUT"
    counts: ClassVar[tuple[str, ...]] = ("r",)
    value_fields: ClassVar[tuple[str, ...]] = ("act_fn", "scaling", "init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= _MOST_LAYERS:
            raise ConfigError(f"depth must be from 0 to {_MOST_LAYERS}, not {shown(self.depth)}", field="depth")
        known = _activations()
        if self.act_fn not in known:
            raise ConfigError(
                f"act_fn must be an activation of transformers, as 'relu', not {shown(self.act_fn)}."
                + did_you_mean(self.act_fn, known),
                field="act_fn",
            )
        if any(True for _ in known[self.act_fn].parameters()):
            raise ConfigError(
                f"act_fn must be an activation without parameters, as 'relu', not {self.act_fn!r}", field="act_fn"
            )

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function that ``act_fn`` names."""
        return _activations()[self.act_fn]


def _activations() -> Any:
    """transformers' activations by name."""
    from transformers.activations import ACT2FN

    return ACT2FN


@register(
    PeanutConfig,
    label="PEANuT",
    listing=Listing(
        when="changes that a small network computes from the weights themselves",
        paper="arXiv:2410.01870",
        summary=lambda config: {"r": str(config.r), "depth": str(config.depth), "σ": config.act_fn},
    ),
    default_targets=usual_targets,
    sample_configs={
        "flat": {"r": 4},
        "deep": {"r": 3, "depth": 2, "act_fn": "silu", "scaling": 0.5},
    },
    files=FileFormat(keys={FIRST: f"{FIRST}.weight", LAST: f"{LAST}.weight", **_KEYS}),
)
class Peanut(Adapter, ConvertsToLora, Rescales, HotSwaps):
    """The network of one layer."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "peanut_A peanut_B peanut_encoders peanut_decoders",
        "r depth scaling act_fn res_num",
        wrapped=(FIRST, LAST, *HIDDEN),
        lists=HIDDEN,
        attributes={"r": "rank", "depth": "depth", "res_num": "depth", "act_fn": "activation"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling", "activation": "act_fn", "function": "activation"}
    identity: ClassVar[Mapping[str, float]] = {LAST: 0.0}

    activation: str
    function: Callable[[Tensor], Tensor]

    @classmethod
    def parameter_shapes(cls, config: PeanutConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, (r, out), B, (out, r), and the hidden layers, (r, r) each."""
        check_linear("PEANuT", path, kind)
        rank, out_features = config.r, kind.features(module)[1]
        hidden = [f"{name}.{number}" for name in HIDDEN for number in range(config.depth)]
        shapes: Shapes = {FIRST: (rank, out_features), LAST: (out_features, rank)}
        return {**shapes, **dict.fromkeys(hidden, (rank, rank))}

    @classmethod
    def initial_tensors(cls, config: PeanutConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        skip_linear(site.device, *site.shapes.values())
        return {
            name: site.new(site.shapes[name], None if name == LAST and config.init_weights else linear_)
            for name in sorted(site.shapes, key=lambda name: name == LAST)
        }

    rank: int = axis_size(LAST, 1)  # Width of the network
    delta_rank = rank

    @property
    def depth(self) -> int:
        """Hidden layers on the way down."""
        return sum(name.startswith(HIDDEN[0]) for name in self._names)

    def rows(self, weight: Tensor, first: Tensor, *hidden: Tensor) -> Tensor:
        """``f(Wᵀ)``, (in, r), in the dtype of A.

        Args:
            weight: W, (out, in).
            first: A.
            hidden: layers of the way down, then those of the way up.
        """
        function, residuals = self.function, []
        found: Tensor = function(weight.to(first.dtype).T @ first.T)
        for encoder in hidden[: len(hidden) // 2]:
            residuals.append(found)
            found = function(found @ encoder.T)
        for decoder in hidden[len(hidden) // 2 :]:
            found = function(found @ decoder.T) + residuals.pop()
        return found

    def _layers(self) -> tuple[Tensor, ...]:
        """A and the hidden layers, as ``rows`` takes them."""
        names = (f"{name}.{number}" for name in HIDDEN for number in range(self.depth))
        return self.tensor(FIRST), *(self.tensor(name) for name in names)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``scaling B f(Wᵀ)ᵀ x``."""
        # The weight is read again in backward, which costs less than to keep a dequantized one.
        rows = keeping_inputs(lambda first, *hidden: self.rows(base.weight(), first, *hidden), *self._layers())
        dtype = compute_dtype(x, rows)
        return F.linear(F.linear(x.to(dtype), rows.T.to(dtype)), self.tensor(LAST).to(dtype)) * self.scaling

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``scaling B f(Wᵀ)ᵀ``, of the given weight."""
        found: Tensor = self.tensor(LAST) @ self.rows(weight, *self._layers()).T
        return found * self.scaling

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """``f(Wᵀ)ᵀ`` and B."""
        return LowRankDelta(
            self.rows(base.weight(), *self._layers()).T, self.tensor(LAST).detach(), float(self.scaling)
        )

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        return shapes[LAST][1]
