"""Methods that add the product of two low-rank factors unchanged; see ``lora.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.contract.adapter import FusesAdd, IsLowRank, LowRankDelta, MergesInPlace, ServesRows
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.kernels.numerics import add_delta, add_scaled_, compute_dtype
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.dropout import Dropout
from nbpeft.engine.methods.lora.initialization.inits import check_init
from nbpeft.engine.methods.lora.low_rank import add_product_, low_rank_of
from nbpeft.engine.methods.lora.multi_adapter import factor_rows
from nbpeft.engine.views.part_modules import ParameterModule
from nbpeft.errors import LayerKindError

_WHOLE_INPUT = Dropout(0.0, False)
"""The subtracted initial component gets no dropout, because it is part of the base weight."""


class PlainLowRank(LowRankAdapter, MergesInPlace):
    """An adapter that adds the product of two factors, and the bias of B, to the output.

    Attributes:
        observed: PEFT's name -> module with hooks, which computes its step of the product; None if there is none.
    """

    linear_setting: ClassVar[str] = ""
    """The setting that selects the method, if that works on linear layers only."""
    observed: Mapping[str, Any] | None = None
    observable: ClassVar[bool] = True
    """Whether the factors' modules can be called one after the other, so that their hooks run."""

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A and B, and the bias of B (out,) with ``lora_bias``."""
        if cls.linear_setting:
            check_linear(cls.linear_setting, path, kind)
        check_init(config, path, module, kind)
        shapes, low_rank = super().parameter_shapes(config, path, module, kind), low_rank_of(kind)
        if config.lora_bias:
            if low_rank.zero_init_factor == 0:
                raise LayerKindError(
                    f"{path}: lora_bias=True is not supported for {kind.peft_name}; exclude it", path=path
                )
            shapes[f"{low_rank.factor_names[1]}_bias"] = (kind.features(module)[1],)
        return shapes

    @property
    def output_bias(self) -> Tensor | None:
        """The bias of B, (out,), with ``lora_bias``; else None."""
        return self.tensor(f"{self.factor_names[1]}_bias", optional=True)

    @property
    def active_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as used in a call."""
        return self.own_factors

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer, fused: bool = False) -> Tensor:
        """``s * B A dropout(x)``, plus ``s`` times the bias of B; with ``fused`` added to the output."""
        if self.observed is not None:
            delta = self._through_modules(base.module, x, self.observed)
            return add_delta(base_output, delta) if fused else delta
        dropout = Dropout(self.dropout, self.training)
        bias, initial = self.output_bias, self.initial
        alone = bias is None and initial is None
        onto = base_output if fused and alone else None
        if initial is not None:
            onto = self.low_rank.forward(base.module, x, (*initial, self.scaling), _WHOLE_INPUT)
        delta = self.low_rank.forward(base.module, x, (*self.active_factors, self.scaling), dropout, onto)
        if alone:
            return delta
        if bias is not None:
            delta = delta + base.kind.per_channel(base.module, bias * self.scaling).to(delta.dtype)
        return add_delta(base_output, delta) if fused else delta

    @property
    def computes_by_parts(self) -> bool:
        """Whether the product is computed by two modules, as on linear layers and convolutions."""
        return self.observable and self.low_rank.has_steps

    def observe(self, module: nn.Module, name: str = "") -> None:
        """Uses a module for its step of the product from now on, so that its hooks run."""
        if not self.computes_by_parts:
            super().observe(module)
            return
        shown = module.shown_parameter if isinstance(module, ParameterModule) else self.peft.modules[0]
        self.bind(observed={**(self.observed or {}), name or shown: module})

    def forget_observed(self, name: str) -> None:
        """Computes a step without its module again."""
        others = {other: module for other, module in (self.observed or {}).items() if other != name}
        self.bind(observed=others or None)

    def _through_modules(self, module: nn.Module, x: Tensor, observed: Mapping[str, Any]) -> Tensor:
        """The product, with each observed step computed by its module."""
        name_A, name_B = self.factor_names
        lora_A, lora_B = self.active_factors
        if lora_A.element_size() > 1:  # one-byte dtypes are for storage only: a hook casts such factors to compute
            x = x.to(compute_dtype(x, lora_A))
        delta = None
        if self.initial is not None:
            delta = self.low_rank.forward(module, x, (*self.initial, self.scaling), _WHOLE_INPUT)
        steps: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            (self.peft.modules[0], lambda value: F.dropout(value, self.dropout, self.training)),
            (name_A, lambda value: self.low_rank.down(module, value, lora_A.to(value.dtype))),
            (name_B, lambda value: self.low_rank.up(module, value, lora_B.to(value.dtype), self.output_bias)),
        ]
        for name, plain in steps:
            x = observed.get(name, plain)(x)
        x = x * self.scaling
        return x if delta is None else x + delta

    def unmergeable_reason(self, base: BaseLayer) -> str:
        """Why the product of the factors differs from what the layer computes, if it does."""
        parts = {name: module for name, module in (self.observed or {}).items() if name in self.factor_names}
        known = (ParameterModule, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        other = next((name for name, module in parts.items() if not isinstance(module, known)), None)
        if other is not None:
            return f"a layer whose {other} is of the class {type(parts[other]).__name__}, which need not be a product"
        return super().unmergeable_reason(base)

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """``s`` times the bias of B, (out,), or None."""
        bias = self.output_bias
        return None if bias is None else bias.detach() * self.scaling

    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        """Adds ``scale * s * B A`` to a canonical weight in place."""
        lora_A, lora_B = self.detached_factors
        if weight.ndim != 2 or lora_B.shape[0] != weight.shape[0]:
            add_scaled_(weight, self.delta_weight(weight, base), scale)
            return
        add_product_(weight, lora_A, lora_B, float(self.scaling) * scale)


class LowRankProduct(PlainLowRank, ServesRows, IsLowRank, FusesAdd):
    """A product that is a low-rank change of the weight in every call."""

    @classmethod
    def mixed(
        cls, adapters: Sequence[Any], scales: Sequence[float], base: BaseLayer, kept: dict[Any, Any]
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """A mixed batch on linear layers as two batched products."""
        if not base.kind.is_linear:
            return None
        if any(adapter is not None and (adapter.output_bias is not None or adapter.observed) for adapter in adapters):
            return None
        if "served" not in kept:
            entries = [
                None if adapter is None else (*adapter.factors, float(adapter.scaling) * scale)
                for adapter, scale in zip(adapters, scales, strict=True)
            ]
            kept["served"] = factor_rows(entries, base.device)
        return kept["served"]

    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        lora_A, lora_B = self.detached_factors
        if self.padded:
            used = lora_A.flatten(1).any(1) | lora_B.transpose(0, 1).flatten(1).any(1)
            used[0] = True
            lora_A, lora_B = lora_A[used], lora_B[:, used]
        return LowRankDelta(lora_A, lora_B, float(self.scaling), self.delta_bias(base))
