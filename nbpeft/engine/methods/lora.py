"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + s * B A dropout(x)          A: (r, in), B: (out, r)
    s = alpha / r, with rsLoRA (arXiv:2312.03732) alpha / sqrt(r)

W and b stay frozen; A starts random and B at zero, so training starts at the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.adapter import Base, Dropout, Host
from nbpeft.engine.base import fits
from nbpeft.engine.factored import FactoredAdapter
from nbpeft.engine.inits import check_init, new_factors, part_of_base
from nbpeft.engine.lora_config import LoraConfig
from nbpeft.engine.lowrank import add_delta
from nbpeft.engine.mixed import factor_rows
from nbpeft.engine.registry import register
from nbpeft.errors import ConfigError

_MERGE_ROWS = 256
"""Rows of a weight merged at a time, which bounds the extra memory of a merge."""
_WHOLE_INPUT = Dropout(0.0, False)
"""What has left the base is no adapter's input: nothing of it is dropped."""


@register(LoraConfig, peft_type="LORA", label="LoRA", applies=lambda config: not config.use_dora)
class LoRA(FactoredAdapter):
    """A LoRA adapter on one layer."""

    adds_itself: ClassVar[bool] = True

    @classmethod
    def parameter_shapes(
        cls, config: LoraConfig, path: str, module: nn.Module, host: Host
    ) -> dict[str, tuple[int, ...]]:
        check_init(config, path, module, host)
        shapes = dict(zip(host.factor_names, host.factor_shapes(module, config.rank_at(path)), strict=True))
        if config.lora_bias:
            if host.zero_factor == 0:
                raise ConfigError(f"{path}: lora_bias=True does not work on an {host.name}; exclude it", path=path)
            shapes[f"{host.factor_names[1]}_bias"] = (host.features(module)[1],)
        return shapes

    @classmethod
    def create(
        cls,
        config: LoraConfig,
        path: str,
        base: Base,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, Tensor] | None,
        dtype: torch.dtype,
    ) -> Self:
        start = part_of_base(config, path, base, dtype)
        if tensors is None:
            tensors = new_factors(shapes, base, config, path, dtype, start)
        parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
        return cls(parameters, base.host, config.scaling_at(path), float(config.lora_dropout), start)

    @property
    def output_bias(self) -> Tensor | None:
        """The bias of B, (out,), where ``lora_bias`` asked for one."""
        return self.held.get(f"{self.factor_names[1]}_bias")

    def forward(self, x: Tensor, base_output: Tensor, base: Base, whole: bool = False) -> Tensor:
        lora_A, lora_B = self.trained_factors
        dropout = Dropout(self.dropout, self.training)
        bias, start = self.output_bias, self.start
        alone = bias is None and start is None
        onto = base_output if whole and alone else None
        if start is not None:
            onto = base.host.low_rank(base.module, x, *start, self.scaling, _WHOLE_INPUT)
        delta = base.host.low_rank(base.module, x, lora_A, lora_B, self.scaling, dropout, onto)
        if alone:
            return delta
        if bias is not None:
            delta = delta + base.host.per_channel(base.module, bias * self.scaling).to(delta.dtype)
        return add_delta(base_output, delta) if whole else delta

    @classmethod
    def mixed(
        cls, adapters: Sequence[Self | None], scales: Sequence[float], base: Base, kept: dict[Any, Any]
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        if not base.host.multiplies:
            return None
        if any(adapter is not None and adapter.output_bias is not None for adapter in adapters):
            return None
        if "served" not in kept:
            entries = [
                None if adapter is None else (*adapter.factors, float(adapter.scaling) * scale)
                for adapter, scale in zip(adapters, scales, strict=True)
            ]
            kept["served"] = factor_rows(entries, base.device)
        return kept["served"]  # type: ignore[no-any-return]

    def delta_weight(self, weight: Tensor, base: Base) -> Tensor:
        lora_A, lora_B = self.detached_factors
        return base.host.product(base.module, lora_A, lora_B) * self.scaling

    def delta_bias(self, base: Base) -> Tensor | None:
        bias = self.output_bias
        return None if bias is None else bias.detach() * self.scaling

    def add_to_(self, weight: Tensor, base: Base, scale: float) -> None:
        lora_A, lora_B = self.detached_factors
        if weight.ndim != 2 or lora_B.shape[0] != weight.shape[0]:
            super().add_to_(weight, base, scale)
            return
        factor = float(self.scaling) * scale
        if weight.dtype == lora_A.dtype and fits(factor, weight.dtype):
            weight.addmm_(lora_B, lora_A, alpha=factor)
            return
        for start in range(0, weight.shape[0], _MERGE_ROWS):
            rows = slice(start, start + _MERGE_ROWS)
            weight[rows] += (lora_B[rows] @ lora_A) * factor
