"""MonteCLoRA: Monte Carlo samples of A around the one that is trained (Sengupta et al. 2024, arXiv:2411.04358).

    y = W x + b + s * B (A + N) dropout(x)        N = ε diag(σ) Σ_n w_n Z_n      in training; N = 0 elsewhere

Z_n, (r, in), are standard normal, one for each of the ``num_samples``. The variances σ², (r,), are those of a Wishart
draw around exp(std)², and the weights w, (num_samples,), are a softmax of normals that approximates a Dirichlet draw
around exp(prior); both are reparametrized, so that std and prior are trained, too. The mean over all layers of this
term is added to the loss:

    kl_loss_weight * (KL of the Dirichlet + KL of the Wishart + KL of the normals) + Σ w²  (with ``use_entropy``)

Only the diagonal of the Wishart matrix is used, and only the diagonal is drawn. The normals are drawn from a seed, one
sample at a time, and drawn again in backward; PEFT stores ``buffer_size`` times ``num_samples`` matrices of A's size
for each layer. In PEFT's KL divergence of the Dirichlet distribution one term has the wrong sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.adapter_names import names_in
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.loss_terms import requested_loss
from nbpeft.engine.contract.method_records import SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.shared_state import Together
from nbpeft.engine.contract.training_hooks import LearnsWithHooks
from nbpeft.engine.kernels.numerics import composes, without_autocast
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, FILES, listing
from nbpeft.engine.methods.lora.initialization.inits import Factors
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.engine.methods.lora.variant_configs import MontecloraConfig

STD = "lora_monteclora_std_prior"
PRIOR = "lora_monteclora_expert_weights_prior"
_PLACE = "lora_monteclora_sampler."
_KEYS = {STD: f"{_PLACE}std_prior", PRIOR: f"{_PLACE}expert_weights_prior"}
_LEAST_VARIANCE = 1e-3
_LEAST = 1e-6
"""Lower bound of concentrations and of the variances of the weights' logits, and added to these; as in PEFT."""


def _draw_seed() -> int:
    """A seed from the CPU generator."""
    return int(torch.randint(1 << 62, (), dtype=torch.long))


def normals(seed: int, count: int, shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Yields the samples of a seed, one at a time, float32; the same samples in each call."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    for _ in range(count):
        yield torch.randn(shape, generator=generator, device=device)


def _draws(seed: int, rank: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The diagonal of a standard Wishart matrix with ``rank`` degrees of freedom, (rank,), and normals, (count,)."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    square = torch.randn(rank, rank, generator=generator, device=device).square()
    return square.sum(1), torch.randn(count, generator=generator, device=device)


class _WeightedNormals(torch.autograd.Function):
    """``Σ_n w_n Z_n`` of the samples of a seed, without saving the samples for backward."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, seed: int, shape: tuple[int, ...]) -> Tensor:
        ctx.seed, ctx.shape, ctx.count, ctx.dtype = seed, shape, len(weights), weights.dtype
        total = torch.zeros(shape, device=weights.device)
        for weight, drawn in zip(weights, normals(seed, len(weights), shape, weights.device), strict=True):
            total += drawn * weight
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        drawn = normals(ctx.seed, ctx.count, ctx.shape, gradient.device)
        return torch.stack([(sample * gradient).sum() for sample in drawn]).to(ctx.dtype), None, None


def _weighted_normals(weights: Tensor, seed: int, shape: tuple[int, ...]) -> Tensor:
    if composes():
        samples = torch.randn(len(weights), *shape, device=weights.device)
        return (samples * weights.view(-1, 1, 1)).sum(0)
    return _WeightedNormals.apply(weights, seed, shape)


def dirichlet_divergence(concentration: Tensor, prior: float) -> Tensor:
    """``KL(Dir(concentration) || Dir(prior, …, prior))``, a scalar.

    Args:
        concentration: (n,), positive.
        prior: positive.
    """
    count, total = len(concentration), concentration.sum()
    flat = torch.tensor(prior, dtype=concentration.dtype, device=concentration.device)
    normalisers: Tensor = (
        total.lgamma() - concentration.lgamma().sum() - (flat * count).lgamma() + flat.lgamma() * count
    )
    moments: Tensor = ((concentration - flat) * (concentration.digamma() - total.digamma())).sum()
    return normalisers + moments


def _with_samplers(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Additional tensors of PEFT's file: the last draws of variances and weights, here the initial ones."""
    more: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place, found, _ = key.partition(f"{_PLACE}std_prior")
        prior = tensors.get(f"{place}{_PLACE}expert_weights_prior")
        if found and prior is not None:
            more[f"{place}{_PLACE}gaussian_var_prior"] = torch.eye(len(tensor), dtype=tensor.dtype)
            more[f"{place}{_PLACE}expert_weights"] = torch.full_like(prior, 1 / len(prior), device="cpu")
    return {**tensors, **more}


def _without_samplers(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    drawn = tuple(f"{_PLACE}{name}" for name in ("gaussian_var_prior", "expert_weights"))
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(drawn)}


class Divergence(Together, LearnsWithHooks):
    """The loss term of all layers."""

    def extra_loss(self) -> Tensor | None:
        """The mean of the loss terms of the layers called in training, a scalar."""
        losses = [loss for adapter in self.adapters.values() if (loss := adapter.variational_loss()) is not None]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else None


def monteclora_loss(manager: Any, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
    """MonteCLoRA's loss term; adding it to a loss that already has it has no effect.

    Args:
        manager: the model's manager.
        adapter_names: the adapters; None for the active ones.

    Returns:
        A scalar; 0.0 if no MonteCLoRA adapter was called in training.
    """
    names = manager.active if adapter_names is None else names_in(adapter_names)
    shared = {name: one for name in names if isinstance(one := manager.shared(name), Divergence)}
    terms = {name: one.extra_loss() for name, one in shared.items()}
    return requested_loss(manager, {name: [term] for name, term in terms.items() if term is not None})


@register(
    LoraConfig,
    draws_in_training=True,
    label="MonteCLoRA",
    listing=listing(
        when="small datasets: also learns the uncertainty of the factor A",
        paper="arXiv:2411.04358",
        variant=lambda config: "rsMonteCLoRA" if config.use_rslora else "",
        listed_with={"monteclora_config": {}},
    ),
    applies=lambda config: config.variant == "monteclora_config",
    sample_configs={
        "plain": {"r": 4, "lora_alpha": 8, "monteclora_config": {"num_samples": 3}},
        "entropy": {"r": 4, "monteclora_config": {"num_samples": 2, "use_entropy": True, "sample_scaler": 1e-3}},
    },
    shares=SharedTensors(state=Divergence),
    **{
        **FAMILY,
        "files": replace(
            FILES,
            keys={**FILES.keys, **_KEYS},
            pack=_with_samplers,
            unpack=_without_samplers,
        ),
    },
)
class MonteCLoRA(LowRankProduct):
    """A MonteCLoRA adapter on one linear layer.

    Attributes:
        settings: the ``MontecloraConfig``.
        drawn: draws of the last call in training: the diagonal of the Wishart matrix, (r,), and the normals,
            (num_samples,).
    """

    peft: ClassVar[PeftNames] = replace(
        LowRankProduct.peft, grouped=_KEYS, model_functions={"_get_monteclora_loss": monteclora_loss}
    )

    linear_setting: ClassVar[str] = "monteclora_config"
    from_config: ClassVar[Mapping[str, str]] = {**LowRankProduct.from_config, "settings": "monteclora_config"}

    settings: MontecloraConfig
    drawn: tuple[Tensor, Tensor] | None

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A and B, the logarithms of standard deviations (r,) and of concentrations (num_samples,)."""
        assert config.monteclora_config is not None
        shapes = super().parameter_shapes(config, path, module, kind)
        return {**shapes, STD: (config.rank_at(path),), PRIOR: (config.monteclora_config.num_samples,)}

    @classmethod
    def drawn_tensors(cls, config: LoraConfig, site: AdapterSite, initial: Factors | None) -> dict[str, Tensor]:
        made = super().drawn_tensors(config, site, initial)
        return made | {name: site.new(site.shapes[name], Tensor.uniform_) for name in (STD, PRIOR)}

    def prepare(self, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(site.shared, Divergence)
        site.shared.adapters[site.path] = self
        self.bind(drawn=None)

    @property
    def active_factors(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = self.trained_factors
        return (lora_A + self._perturbation(lora_A) if self.training else lora_A), lora_B

    def _perturbation(self, lora_A: Tensor) -> Tensor:
        """N, (r, in), in the dtype of A; zero in rows of padding."""
        std: Tensor = self.tensor(STD)
        prior: Tensor = self.tensor(PRIOR)
        self.bind(drawn=_draws(_draw_seed(), len(std), len(prior), lora_A.device))
        with without_autocast(lora_A.device.type):
            variances, weights = self._posterior()
            shape = len(std), lora_A.shape[1]
            noise = _weighted_normals(weights, _draw_seed(), shape) * variances.sqrt().unsqueeze(1)
            padding = len(lora_A) - len(std)
            noise = F.pad(noise, (0, 0, 0, padding)) if padding else noise
            return (noise * self.settings.sample_scaler).to(lora_A.dtype)

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """σ², (r,), and w, (num_samples,), of the last draws, in at least float32."""
        assert self.drawn is not None
        wishart, normal = self.drawn
        variances = (wishart * (2 * self.tensor(STD)).exp()).clamp_min(_LEAST_VARIANCE)
        concentration, count = self.tensor(PRIOR).exp().clamp_min(_LEAST), len(normal)
        inverse, middle = 1 / concentration, concentration.log()
        spread = (inverse * (1 - 2 / count) + inverse.sum() / count**2).clamp_min(_LEAST)
        logits = (spread + _LEAST).sqrt() * normal + middle - middle.mean()
        return variances, logits.softmax(-1)

    def variational_loss(self) -> Tensor | None:
        """The layer's loss term, a scalar; None before its first call in training."""
        if self.drawn is None:
            return None
        settings, (variances, weights) = self.settings, self._posterior()
        std: Tensor = self.tensor(STD)
        prior: Tensor = self.tensor(PRIOR)
        rank = len(std)
        wishart = rank * ((2 * std).exp().sum() - 2 * std.sum() - rank) / 2
        normal = len(weights) * (variances.sum() - variances.log().sum() - rank) / 2
        dirichlet = dirichlet_divergence(prior.exp(), settings.dirichlet_prior)
        loss = settings.kl_loss_weight * (dirichlet + wishart + normal)
        return loss + weights.square().sum() if settings.use_entropy else loss

    def swap_refusal(self) -> str:
        return super().swap_refusal() or "stores the spread of its factors, too"

    def reset_(self, base: BaseLayer) -> None:
        """Sets the factors to zero; variances and concentrations are unchanged."""
        for factor in self.trained_factors:
            factor.detach().zero_()
