"""GLoRA: changes of a weight and its bias, by addition and by multiplication (Chavan et al. 2023, arXiv:2306.07967).

    W' = W + W ∘ A + B        b' = b + b ∘ D + E + W C

A and B are each a product of two factors (out, r) and (r, in), a column (out, 1), one number, or nothing; C, (in, 1),
is such a product, a column or nothing; D and E are vectors (out,), one number, or nothing. C, D and E exist if the
layer has a bias. For "none" PEFT writes zeros into files, up to the size of a weight; here these are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ReplacesCall
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import linear_, normal_
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import apply_delta, in_one_product, keeping_inputs

_PARTS = ("Xd", "Xu", "X")
_KEYS = {f"glora_{path}_{part}": f"glora_{path}.{part}" for path in "ABCDE" for part in _PARTS}
_DEVIATION = 0.02
"""Standard deviation of random numbers."""


@dataclass
class GloraConfig(TrainsBiases):
    """Config of GLoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of the products.
        config_A_B: form of A and B: "lora", "vector", "constant" or "none".
        config_C: form of C: "lora", "vector" or "none".
        config_D_E: form of D and E: "vector", "constant" or "none".
        init_weights: start at the base model; False for random numbers.
    """

    r: int = field(default=8)
    config_A_B: str = field(default="lora")
    config_C: str = field(default="lora")
    config_D_E: str = field(default="constant")
    init_weights: bool = field(default=True)

    method_type: ClassVar[str] = "GLORA"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    counts: ClassVar[tuple[str, ...]] = ("r",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "config_A_B": ("lora", "vector", "constant", "none"),
        "config_C": ("lora", "vector", "none"),
        "config_D_E": ("vector", "constant", "none"),
    }
    value_fields: ClassVar[tuple[str, ...]] = ("init_weights",)


def _shapes(path: str, form: str, rows: int, columns: int, rank: int) -> Shapes:
    """Parameter name -> shape of one of A to E, which is (rows, columns), or (rows,) where columns is 0."""
    if form == "lora":
        return {f"glora_{path}_Xd": (rows, rank), f"glora_{path}_Xu": (rank, columns)}
    shape = {"vector": (rows, 1) if columns else (rows,), "constant": (1,)}.get(form)
    return {} if shape is None else {f"glora_{path}_X": shape}


def _without_zeros(config: GloraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file without the large tensors of zeros that PEFT writes for parts that are left out."""
    return {key: tensor for key, tensor in tensors.items() if not (key.endswith(".zeros") and "glora_" in key)}


@register(
    GloraConfig,
    label="GLoRA",
    listing=Listing(
        when="like LoRA, but also scales weights and trains biases",
        paper="arXiv:2306.07967",
        summary=lambda config: {
            "r": str(config.r),
            "AB": config.config_A_B,
            "C": config.config_C,
            "DE": config.config_D_E,
        },
    ),
    default_targets=usual_targets,
    sample_configs={
        "r4": {"r": 4},
        "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "numbers": {"config_A_B": "constant", "config_C": "none"},
    },
    files=FileFormat(keys=_KEYS, unpack=_without_zeros),
)
class Glora(Adapter, ReplacesCall):
    """The parameters that change the weight and the bias of one layer."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "glora_A glora_B glora_C glora_D glora_E", "r", layer_prefix="Glora", attributes={"r": "rank"}, grouped=_KEYS
    )
    from_config: ClassVar[Mapping[str, str]] = {"rank": "r"}

    rank: int

    @classmethod
    def parameter_shapes(cls, config: GloraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Shapes of A and B, and of C, D and E if the layer has a bias."""
        check_linear("GLoRA", path, kind)
        in_features, out_features = kind.features(module)
        found: Shapes = {}
        for one in "AB":
            found |= _shapes(one, config.config_A_B, out_features, in_features, config.r)
        if getattr(module, "bias", None) is not None:
            found |= _shapes("C", config.config_C, in_features, 1, config.r)
            for one in "DE":
                found |= _shapes(one, config.config_D_E, out_features, 0, config.r)
        return found

    @classmethod
    def initial_tensors(cls, config: GloraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        order = sorted(site.shapes, key=lambda one: (one[:7], one[-1] == "d"))
        return {name: _start(name, config, site) for name in order}

    def _path(self, path: str) -> tuple[Tensor, ...]:
        """The parameters of one of A to E; empty for nothing."""
        found = (self.tensor(f"glora_{path}_{part}", optional=True) for part in _PARTS)
        return tuple(tensor for tensor in found if tensor is not None)

    def _change(self, weight: Tensor, *parameters: Tensor) -> Tensor:
        """``W ∘ A + B``, shaped like the weight; ``parameters`` are those of A, then of B, and determine the dtype."""
        first, second = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        return weight.to(parameters[0].dtype) * _value(first) + _value(second)

    def _bias_change(self, base: BaseLayer) -> Tensor | None:
        """``b ∘ D + E + W C``, (out,), in the dtype of the parameters; None if the bias does not change."""
        bias, coupling, factor, summand = base.bias, self._path("C"), self._path("D"), self._path("E")
        if bias is None or not (coupling or factor):
            return None
        projected = keeping_inputs(lambda *given: _projected(base.weight(), given), *coupling) if coupling else None
        if not factor:
            return projected
        own = bias.to(factor[0].dtype) * factor[0] + summand[0]
        return own if projected is None else own + projected

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """``W' x + b'`` in one product, where the weight is not quantized."""
        parameters = self._path("A") + self._path("B")

        def changed(weight: Tensor, *given: Tensor) -> Tensor:
            return weight + self._change(weight, *given).to(weight.dtype)

        found = in_one_product(x, base, changed, parameters) if parameters else None
        bias = None if found is None else self._bias_change(base)
        return found if found is None or bias is None else found + bias.to(found.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The layer's map with ``W ∘ A + B`` and the change of the bias."""
        parameters, bias = self._path("A") + self._path("B"), self._bias_change(base)
        if not parameters:
            return torch.zeros_like(base_output) if bias is None else bias.expand_as(base_output)
        found = apply_delta(x, base, lambda *given: self._change(base.weight(), *given), parameters)
        return found if bias is None else found + bias.to(found.dtype)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``W ∘ A + B``, of the given weight."""
        parameters = self._path("A") + self._path("B")
        return self._change(weight, *parameters) if parameters else torch.zeros_like(weight)

    @torch.no_grad()
    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """``b ∘ D + E + W C``."""
        return self._bias_change(base)

    def reset_(self, base: BaseLayer) -> None:
        for name, parameter in self.named_parameters():
            if not name.endswith("Xu"):
                parameter.detach().zero_()


def _value(parameters: tuple[Tensor, ...]) -> Tensor:
    """The matrix or vector of some parameters: their product, or the only one."""
    return parameters[0] @ parameters[1] if len(parameters) == 2 else parameters[0]


def _projected(weight: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """``W C``, (out,)."""
    found = weight.to(parameters[0].dtype)
    for parameter in parameters:
        found = found @ parameter
    return found.squeeze(-1)


def _start(name: str, config: GloraConfig, site: AdapterSite) -> Tensor:
    """A new parameter."""
    shape = site.shapes[name]
    zeros = torch.zeros(shape, device=site.base.device, dtype=site.dtype)
    if config.init_weights and not name.endswith("Xu"):
        return zeros
    if shape == (1,):
        return site.new(shape, partial(normal_, std=_DEVIATION))
    return site.new(shape, linear_) if len(shape) == 2 else site.new((1, *shape), linear_)[0]
