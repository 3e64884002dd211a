"""VeLoRA: saves a layer's input compressed for backward (Miles et al. 2024, arXiv:2405.17991).

    y = W x + b + s * B A dropout(x)          as LoRA; the gradient of A is that of A x̂

The input is split into ``num_groups`` groups of n features, and only the projection of each group onto one direction v,
(n,), is saved: tokens x num_groups numbers instead of tokens x in. For the gradient of A the input is reconstructed:

    x̂ = scale * (c ⊗ v),  c_g = x_gᵀ v        A x̂ = scale * Ã c,  Ã_g = A_g v      (r, num_groups)

x̂ itself is never built: two thin products have the gradient of A x̂, and cost less. The gradients of B and of the input
are exact. v is the mean group of the batch, of the first batch, or random. Merging and evaluation are LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterSite, HasFixedTensors
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape
from nbpeft.engine.contract.initial_draws import drawn, normal_
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import add_delta, compute_dtype
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.dropout import Dropout, lean_dropout
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.engine.methods.lora.variant_configs import VeloraConfig

DIRECTION = "lora_velora_embed"
"""The buffer of v."""


def pieces(tensor: Tensor, count: int) -> Tensor:
    """Splits the last dimension: (…, n) as (…, count, n / count), with the last group padded with zeros."""
    size = -(-tensor.shape[-1] // count)
    missing = count * size - tensor.shape[-1]
    padded = F.pad(tensor, (0, missing)) if missing else tensor
    return padded.reshape(*padded.shape[:-1], count, size)


def normalised(direction: Tensor) -> Tensor:
    """The direction normalized to length 1, in float32; a vector of zeros becomes a uniform direction."""
    direction = direction.float()
    norm = torch.linalg.vector_norm(direction)
    return torch.where(norm > 0, direction / norm, direction.numel() ** -0.5)


@register(
    LoraConfig,
    label="VeLoRA",
    listing=listing(
        when="long sequences: only a part of each layer's input is kept for backward",
        paper="arXiv:2405.17991",
        variant=lambda config: "rsVeLoRA" if config.use_rslora else "",
        listed_with={"velora_config": {}},
    ),
    applies=lambda config: config.variant == "velora_config",
    sample_configs={
        "average": {"r": 4, "lora_alpha": 8, "velora_config": {"num_groups": 4}},
        "once": {"r": 4, "velora_config": {"num_groups": 3, "init_type": "batch_average_once"}},
        "random": {"r": 4, "velora_config": {"num_groups": 8, "init_type": "random", "scale": 2.0}},
    },
    **FAMILY,
)
class VeLoRA(LowRankProduct, HasFixedTensors):
    """A VeLoRA adapter on one linear layer.

    Attributes:
        settings: the ``VeloraConfig``.
    """

    linear_setting: ClassVar[str] = "velora_config"
    from_config: ClassVar[Mapping[str, str]] = {**LowRankProduct.from_config, "settings": "velora_config"}

    settings: VeloraConfig
    is_found: ClassVar[bool] = False
    peft: ClassVar[PeftNames] = replace(
        LowRankProduct.peft, attributes={**LowRankProduct.peft.attributes, DIRECTION: DIRECTION}
    )

    @classmethod
    def fixed_tensors(
        cls, config: LoraConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        assert config.velora_config is not None
        return {DIRECTION: ((-(-shapes["lora_A"][1] // config.velora_config.num_groups),), torch.float32)}

    def prepare(self, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """The direction, which may be loaded; until it is found it is zero."""
        is_random, direction = self.settings.init_type == "random", tensors.get(DIRECTION)
        if direction is None:
            (shape, dtype) = self.fixed_tensors(config, site.shapes, site.base.module, site.base.kind)[DIRECTION]
            fill = normal_ if is_random else Tensor.zero_
            direction = drawn(shape, fill, site.base.device, dtype)
            direction = normalised(direction) if is_random else direction
        self.register_buffer(DIRECTION, direction)
        self.bind(is_found=is_random or (not direction.is_meta and bool(direction.any())))

    @torch.no_grad()
    def _direction(self, x: Tensor) -> Tensor:
        """v, (n,), for an input (…, in); updated if it depends on the batch."""
        if self.settings.init_type == "batch_average" or not self.is_found:
            mean = pieces(x, self.settings.num_groups).flatten(0, -2).mean(0)
            self._buffers[DIRECTION] = normalised(mean)
            self.bind(is_found=True)
        direction = self._buffers[DIRECTION]
        assert direction is not None
        return direction.to(x.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer, fused: bool = False) -> Tensor:
        """Computes the same as ``LoRA.forward``, but saves less of ``x`` in training."""
        if not (self.training and torch.is_grad_enabled()) or self.observed is not None:
            return super().forward(x, base_output, base, fused)
        lora_A, lora_B = self.trained_factors
        x = x.to(compute_dtype(x, lora_A))
        dropped = lean_dropout(x, Dropout(self.dropout, True))
        hidden = self._hidden(dropped, lora_A.to(x.dtype)) * self.scaling
        bias = self.output_bias
        delta = self.low_rank.up(base.module, hidden, lora_B.to(x.dtype), None)
        if self.initial is not None:  # never trained, so nothing of x is saved for it
            delta = delta + self.low_rank.compose(base.module, x, (*self.initial, self.scaling))
        delta = delta if bias is None else delta + bias.to(delta.dtype) * self.scaling
        return add_delta(base_output, delta) if fused else delta

    def _hidden(self, x: Tensor, lora_A: Tensor) -> Tensor:
        """``A x``, (…, r), with the gradient of ``A x̂`` for A."""
        count = self.settings.num_groups
        direction = self._direction(x.detach())
        projections = pieces(x.detach(), count) @ direction
        learned = F.linear(projections, pieces(lora_A, count) @ direction * self.settings.scale)
        return F.linear(x, lora_A.detach()) + (learned - learned.detach())

    def swap_refusal(self) -> str:
        return super().swap_refusal() or "stores a direction of its inputs in addition to its factors"
