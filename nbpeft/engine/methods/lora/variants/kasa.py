"""KaSA: knowledge-aware singular-value adaptation (Wang et al. 2024, arXiv:2412.06071).

    y = W' x + b + s * B diag(E) A dropout(x)          A: (r, in), B: (out, r), E: (r,)
    W' = W without its r smallest singular values

So training starts not at the base model, but at the base model without the least important components of W. On each
layer, ``beta * ‖E‖² + gamma * (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖)`` is added to the loss: A and B stay nearly orthogonal, so that
E are approximately the singular values of the delta.

PEFT replaces W by W' permanently. Here W is not changed and the adapter subtracts the difference,
``W + s (B E A - B0 A0)`` (see inits.py): files are the same, but other adapters, ``disable_adapter`` and ``unload`` get
the original base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.adapter_names import names_in
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import stored
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.loss_terms import requested_loss
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.training_hooks import LearnsWithHooks
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.initialization.inits import Factors, init_factors
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.errors import HotSwapError

DIAGONAL = "lora_diag"


def kasa_loss(manager: Any, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
    """KaSA's loss term, the sum over all layers; adding it to a loss that already has it has no effect.

    Args:
        manager: the model's manager.
        adapter_names: the adapters; None for the active ones.

    Returns:
        A scalar; 0.0 if no layer has a KaSA adapter.
    """
    names = manager.active if adapter_names is None else names_in(adapter_names)
    adapters = {name: [layer.adapters._modules.get(name) for layer in manager.layers.values()] for name in names}
    return requested_loss(
        manager,
        {
            name: [adapter.penalty() for adapter in parts if isinstance(adapter, KaSA)]
            for name, parts in adapters.items()
        },
    )


@register(
    LoraConfig,
    label="KaSA",
    listing=listing(
        when="like LoRA, but trains singular values that replace the weight's smallest ones",
        paper="arXiv:2412.06071",
        variant=lambda config: "rsKaSA" if config.use_rslora else "",
        listed_with={"kasa_config": {}},
    ),
    applies=lambda config: config.variant == "kasa_config",
    sample_configs={"kasa": {"r": 4, "lora_alpha": 8, "kasa_config": {"beta": 1e-2, "gamma": 1e-2}}},
    **FAMILY,
)
class KaSA(LowRankProduct, LearnsWithHooks):
    """A KaSA adapter on one linear layer.

    Attributes:
        weights: beta and gamma.
    """

    observable: ClassVar[bool] = False
    peft: ClassVar[PeftNames] = replace(LowRankProduct.peft, model_functions={"_get_kasa_loss": kasa_loss})

    weights: tuple[float, float]

    def prepare(self, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        self.bind(weights=(config.kasa_config.beta, config.kasa_config.gamma))

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, B, the bias of B (out,) with ``lora_bias``, and the diagonal, (r,)."""
        return super().parameter_shapes(config, path, module, kind) | {DIAGONAL: (config.rank_at(path),)}

    @classmethod
    def drawn_tensors(cls, config: LoraConfig, site: AdapterSite, initial: Factors | None) -> dict[str, Tensor]:
        """Random factors, not those of the component that is subtracted."""
        return init_factors(config, site, None) | {DIAGONAL: site.new(site.shapes[DIAGONAL], normal_)}

    diagonal: Tensor = stored(DIAGONAL)  # E, (r,)

    @property
    def own_factors(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.trained_factors
        return lora_A * self.diagonal[:, None], lora_B

    def penalty(self) -> Tensor:
        """The layer's loss term, a scalar in float32."""
        beta, gamma = self.weights
        lora_A, lora_B = (factor.float() for factor in self.trained_factors)
        distances = [torch.linalg.vector_norm(rows @ rows.T - _identity(rows)) for rows in (lora_A, lora_B.T)]
        return beta * self.diagonal.float().square().sum() + gamma * (distances[0] + distances[1])

    def extra_loss(self) -> Tensor | None:
        return self.penalty() if any(self.weights) else None

    def enlarged(self, size: int, base: BaseLayer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Always refuses: with another rank another component of the weight is removed."""
        raise HotSwapError(f"a KaSA of rank {self.rank} cannot be padded to rank {size}: load it under another name")


def _identity(rows: Tensor) -> Tensor:
    return torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
