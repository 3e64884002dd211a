"""Arrow: routes each token to the LoRA adapters closest to it (Ostapenko et al. 2024, arXiv:2405.11157).

    y = W x + b + Σ_i c_i s_i B_i A_i x        c = softmax(|p_iᵀ x| / temperature) over the top_k largest

The prototype p_i, (in,), is the direction of the input that adapter i changes most: the first right singular vector
of B_i A_i. It is computed from the small core of two QR decompositions, so neither B_i A_i nor random numbers are
needed. It is cached until a factor changes.

GenKnowSub (Bagherifard et al. 2025, 2025.acl-short.54) subtracts general knowledge from each adapter: with the means
A_g and B_g of general adapters' factors, A_i - A_g and B_i - B_g replace A_i and B_i. By linearity that costs one more
product for all adapters together, and the adapters themselves are not changed:

    Σ_i c_i (B_i - B_g) (A_i - A_g) x = Σ_i B_i h_i - B_g Σ_i h_i        h_i = c_i (A_i x - A_g x)

A router has no tensors of its own (PEFT's file has two unused factors). The adapters it routes to are looked up on its
layer in each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, HotSwaps, IsLowRank
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.method_records import Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.trained import optimizer_steps
from nbpeft.engine.kernels.numerics import compute_dtype, stamp
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, FILES
from nbpeft.engine.methods.lora.variant_configs import ArrowConfig
from nbpeft.errors import AdapterError, ConfigError, few

Factors = tuple[Tensor, Tensor]


def prototype(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The first right singular vector of ``B A``, (in,), in at least float32; its sign is arbitrary.

    Args:
        lora_A: (r, in).
        lora_B: (out, r).
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    outer = torch.linalg.qr(lora_A.to(dtype).T)
    core = torch.linalg.qr(lora_B.to(dtype)).R @ outer.R.T
    return outer.Q @ torch.linalg.svd(core).Vh[0]


def _without_factors(config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without PEFT's unused LoRA factors."""
    return {key: value for key, value in tensors.items() if ".lora_" not in key}


@register(
    LoraConfig,
    label="Arrow",
    listing=Listing(
        summary=lambda config: {"top k": str(config.arrow_config.top_k)},
        when="routing each token among the existing adapters of several tasks",
        paper="arXiv:2405.11157",
        variant=lambda config: "Arrow + GenKnowSub" if config.arrow_config.use_gks else "",
        listed_with={"arrow_config": {}},
    ),
    applies=lambda config: config.variant == "arrow_config",
    **{
        **FAMILY,
        "files": replace(FILES, unpack=_without_factors, has_tensors=False),
        "combine": None,
    },
)
class Arrow(Adapter, HotSwaps):
    """The router of one linear layer.

    Attributes:
        settings: the ``ArrowConfig``.
        dropout: dropout probability of the delta, as in PEFT.
    """

    peft: ClassVar[PeftNames] = PeftNames(LowRankAdapter.peft.parameters, LowRankAdapter.peft.others)
    from_config: ClassVar[Mapping[str, str]] = {"settings": "arrow_config", "dropout": "dropout"}

    settings: ArrowConfig
    dropout: float
    _kept: tuple[Any, Tensor, Factors | None] | None = None

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        check_linear("arrow_config", path, kind)
        return {}

    @classmethod
    def create(cls, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        made = super().create(config, site, tensors)
        try:
            made._products(site.base)
        except AdapterError as error:
            raise ConfigError(f"{site.path}: {error}", path=site.path, field="arrow_config") from None
        return made

    def _products(self, base: BaseLayer) -> tuple[list[LowRankAdapter], list[LowRankAdapter]]:
        """The layer's adapters that tokens are routed to, and the general adapters if they are subtracted.

        Raises:
            AdapterError: there are none, one is missing or not a LoRA, or the general adapters have another rank.
        """
        here, settings = base.adapters, self.settings
        general = settings.general_among(here)
        others = [name for name, one in here.items() if name not in general and isinstance(one, IsLowRank)]
        chosen = settings.task_adapter_names or others
        if not chosen:
            raise AdapterError("Arrow has no adapter to route to: load LoRA adapters first")
        if settings.use_gks and not general:
            raise AdapterError("use_gks needs general adapters: load them as gks_0, gks_1, … or name gks_adapter_names")
        found = list(_of_lora(here, chosen)), list(_of_lora(here, general if settings.use_gks else ()))
        ranks = {one.factors[0].shape[0] for group in found for one in group}
        if settings.use_gks and len(ranks) > 1:
            raise AdapterError(f"use_gks needs adapters of one rank, these have {', '.join(map(str, sorted(ranks)))}")
        return found

    def _prepared(
        self, routed: Sequence[LowRankAdapter], general: Sequence[LowRankAdapter]
    ) -> tuple[Tensor, Factors | None]:
        """The prototypes (count, in), and the means of the general factors; cached until a factor changes."""
        stamps = [stamp(factor.detach(), deep=True) for one in (*routed, *general) for factor in one.trained_factors]
        now = (optimizer_steps(), len(routed), *stamps)
        if self._kept is None or self._kept[0] != now or None in stamps:
            with torch.no_grad():
                self.bind(_kept=(now, *_prototypes_and_means(routed, general)))
        assert self._kept is not None
        return self._kept[1:]

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``Σ_i c_i s_i B_i A_i x``, plus the biases of ``B_i`` if there are any.

        Raises:
            AdapterError: it cannot route, because adapters were deleted or renamed.
        """
        routed, general = self._products(base)
        prepare: Any = self._prepared
        if torch.compiler.is_compiling():  # compiled code has no guards for changes of tensors
            prepare = torch.compiler.disable(prepare)
        prototypes, means = prepare(routed, general)
        tokens = x.to(compute_dtype(x, routed[0].trained_factors[0]))
        weights = self._coefficients(tokens, prototypes.to(tokens.dtype))
        subtracted = None if means is None else F.linear(tokens, means[0].to(tokens.dtype))
        total = together = None
        for weight, one in zip(weights.unsqueeze(-2).unbind(-1), routed, strict=True):
            lora_A, lora_B = (factor.to(tokens.dtype) for factor in one.factors)
            hidden, weight = one.low_rank.down(base.module, tokens, lora_A), weight * one.scaling
            hidden = (hidden if subtracted is None else hidden - subtracted) * weight
            added = one.low_rank.up(base.module, hidden, lora_B, None)
            bias = getattr(one, "output_bias", None)
            added = added if bias is None else added + bias.to(added.dtype) * weight
            total = added if total is None else total + added
            together = hidden if together is None else together + hidden
        assert total is not None and together is not None
        if means is not None:
            total = total - F.linear(together, means[1].to(together.dtype))
        return F.dropout(total, self.dropout, self.training)

    def _coefficients(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """The weight of each adapter for each token, (…, count): zero except for ``top_k``, with sum 1."""
        scores = F.linear(tokens, prototypes).abs()
        best, places = scores.topk(min(self.settings.top_k, scores.shape[-1]), -1)
        shares = (best / self.settings.router_temperature).softmax(-1)
        return torch.zeros_like(scores, dtype=shares.dtype).scatter(-1, places, shares)

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "a weight: Arrow routes each token through adapters of its own"

    def swap_refusal(self) -> str:
        return "routes over other adapters and has no tensors of its own"

    def configure(self, config: LoraConfig, path: str) -> None:
        self.bind(_kept=None)

    def keep_settings(self, change: Transaction) -> None:
        change.keep_attributes(self, "_kept")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}


def _of_lora(here: Mapping[str, Any], names: Sequence[str]) -> Iterator[LowRankAdapter]:
    """The adapters of some names.

    Raises:
        AdapterError: one is missing, or is not a plain product of two factors.
    """
    for name in names:
        adapter = here.get(name)
        if adapter is None:
            raise AdapterError(f"Arrow routes over {name!r}, which is not on the layer; it has {few(list(here))}")
        if not (isinstance(adapter, LowRankAdapter) and isinstance(adapter, IsLowRank)):
            raise AdapterError(f"Arrow routes over LoRA adapters: {name!r} is a {type(adapter).__name__}")
        yield adapter


def _prototypes_and_means(
    routed: Sequence[LowRankAdapter], general: Sequence[LowRankAdapter]
) -> tuple[Tensor, Factors | None]:
    factors = [adapter.detached_factors for adapter in routed]
    if not general:
        return torch.stack([prototype(*pair) for pair in factors]), None
    mean_A, mean_B = (
        torch.stack(group).mean(0) for group in zip(*(adapter.detached_factors for adapter in general), strict=True)
    )
    return torch.stack([prototype(lora_A - mean_A, lora_B - mean_B) for lora_A, lora_B in factors]), (mean_A, mean_B)
