"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + s * B A dropout(x)          A: (r, in), B: (out, r)
    s = alpha / r, with rsLoRA (arXiv:2312.03732) alpha / sqrt(r)

W and b stay frozen; A starts random and B at zero, so training starts at the base model.

``B A x`` is computed in three places, each for a reason; tests check that they agree:

    one function      ``products``, which stores little for backward on a CPU and starts few kernels on an
                      accelerator. ``LoRA.output`` calls it on an ordinary linear layer, W x included: set a breakpoint
                      for the usual call there. On every other linear layer, and on a CPU if W is in half precision,
                      ``LowRank.forward`` calls it for the product alone. Several active adapters are one product of
                      their joined factors (``LoRA.added``).
    plain operations  ``LowRank.down``, then ``up``: for ``torch.compile``, ``torch.func`` and hooks on ``lora_A`` and
                      ``lora_B``, which must see each operation; for convolutions and embeddings, which are no matrix
                      products; and for variants that change the values between the factors (VeLoRA, Arrow, X-LoRA).
    a mixed batch     ``multi_adapter``: rows that use different adapters, on an accelerator in two batched products
                      and on a CPU without copies of the factors.

The matrix ``B A`` itself is ``LowRank.product``, for DoRA's norms and for merging, which on linear layers adds it in
place without building it (``low_rank.add_product_``).

A bare parameter is no layer: its module multiplies by it, so ``wrappers.factored_weight`` adds the product in there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AddsTogether, ReplacesCall
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.method_records import OwnKinds, SharedTensors
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import composes, compute_dtype
from nbpeft.engine.methods.lora.attention import AttentionLoRA
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.parameters import ParameterLoRA
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.engine.methods.lora.products import adapted_linear, low_rank_linear
from nbpeft.engine.methods.lora.tied import TiedProduct, check_tied

_PLAIN = (nn.Parameter, Tensor)
"""Classes of weights that need not be asked how they compute."""


def _variant(config: LoraConfig) -> str:
    """The name of the variant, such as rsLoRA; empty for plain LoRA."""
    name = "rsLoRA" if config.use_rslora else ""
    return f"quantization-aware {name or 'LoRA'}" if config.quantization_aware else name


def _tied_class(config: LoraConfig, paths: Sequence[str]) -> type[TiedProduct]:
    """The class of adapters that share another adapter's factors; refuses configs for which that is impossible."""
    check_tied(config, paths)
    return TiedLoRA


@register(
    LoraConfig,
    label="LoRA",
    listing=listing(
        when="the usual choice: every tool and inference server supports it", paper="arXiv:2106.09685", variant=_variant
    ),
    applies=lambda config: not config.variant,
    sample_configs={
        "plain": {"r": 4, "lora_alpha": 8},
        "rslora": {"r": 4, "use_rslora": True},
        "bias": {"r": 4, "lora_bias": True},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "olora": {"r": 4, "init_lora_weights": "olora"},
        "pissa": {"r": 4, "init_lora_weights": "pissa"},
    },
    kinds=OwnKinds(classes={"parameter": ParameterLoRA, "attention": AttentionLoRA}),
    shares=SharedTensors(tied_class=_tied_class),
    **FAMILY,
)
class LoRA(LowRankProduct, ReplacesCall, AddsTogether):
    """A LoRA adapter on one layer."""

    @classmethod
    def added(
        cls, adapters: Sequence[Any], scales: Sequence[float], x: Tensor, output: Tensor, base: BaseLayer
    ) -> Tensor | None:
        """The product of the factors of all adapters, joined along the rank; None unless all are plain products.

        Adapters with different scalings are not joined in float16, in which B times a small scaling loses digits.
        """
        if composes() or not base.kind.is_linear:
            return None
        parts, factors = [], []
        for adapter, scale in zip(adapters, scales, strict=True):
            drops = adapter.dropout and adapter.training
            if drops or adapter.observed is not None or adapter._buffers or adapter.output_bias is not None:
                return None
            parts.append(adapter.own_factors)
            factors.append(adapter.scaling * scale)
        if len({(part.dtype, part.device) for pair in parts for part in pair}) > 1 or parts[0][0].device != x.device:
            return None
        alike = all(type(factor) is float and factor == factors[0] for factor in factors)
        if not alike and compute_dtype(x, parts[0][0]) == torch.float16:
            return None
        lora_B = [B if alike else B * factor for (_, B), factor in zip(parts, factors, strict=True)]
        joined = torch.cat([lora_A for lora_A, _ in parts]), torch.cat(lora_B, 1), factors[0] if alike else 1.0
        return low_rank_linear(x, joined, 0.0, output)

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """The output of an ordinary linear layer plus the product, in one function; None for anything else.

        In the usual call of a layer a breakpoint stops here, and ``LowRank.forward`` is not called.
        """
        layer = base.module
        if composes():  # first, so that the compiler adds no guards for the checks below
            return None
        if type(layer) is not nn.Linear or base.backend.name != "dense":
            return None
        weight = layer.weight
        if type(weight) not in _PLAIN or self.observed is not None or self._buffers:
            return None
        if self.output_bias is not None:
            return None
        probability = self.dropout if self.training else 0.0
        return adapted_linear(x, weight, layer.bias, (*self.trained_factors, self.scaling), probability)


class TiedLoRA(TiedProduct, LoRA):
    """A LoRA adapter that uses the factors of another layer's adapter."""
