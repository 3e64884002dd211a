"""bitsandbytes 8-bit weights (LLM.int8()): one int8 code per element and one scale per row.

Codes and scales are attributes of the parameter (``weight.CB``, ``weight.SCB``) until the first forward
moves them to ``module.state``; a module created with ``has_fp16_weights`` keeps floating weights.

Reference: LLM.int8(), https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.rounding import Grid
from nbpeft.engine.kernels.storage import StoredWeight, keep_parameter_classes, loaded, plain


@dataclass(frozen=True)
class Snapshot8bit:
    """Codes and scales on the CPU, and whether they were on the module's state."""

    data: Tensor
    scales: Tensor | None
    initialised: bool


@register_backend
class Bnb8bit(StoredWeight):
    """``bitsandbytes.nn.Linear8bitLt`` and ``Embedding8bit``."""

    name = "bnb8bit"
    peft_name = "Linear8bitLt"

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is one of the library's 8-bit layers, quantized or not."""
        return isinstance(module, loaded("bitsandbytes.nn", "Linear8bitLt", "Embedding8bit"))

    def prepare(self, module: nn.Module) -> bool:
        """Makes pickling preserve the parameter's class; nothing has to be released."""
        keep_parameter_classes(module)
        return False

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """Codes and scales, and codes cached in addition to floating weights."""
        state = getattr(module, "state", None)
        parts = [plain(module.weight), _scales(module), getattr(state, "CB", None), getattr(module.weight, "CB", None)]
        return [part for part in parts if part is not None]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """float32 for codes, whose scales are float32; else the stored dtype."""
        dtype = plain(module.weight).dtype
        return torch.float32 if dtype == torch.int8 else dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in); a new float32 tensor, or the stored tensor when it is not quantized."""
        data = plain(module.weight)
        if data.dtype != torch.int8:
            return data
        scales = _scales(module)
        assert scales is not None
        return data.float() * scales.to(data.device).view(-1, 1) * (1.0 / 127.0)

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes by row, through float16 as the library does when it loads a weight."""
        stored = plain(module.weight)
        with torch.no_grad():
            if stored.dtype != torch.int8:
                if weight.data_ptr() != stored.data_ptr():
                    stored.copy_(weight)
                _forget(module)
                return
            half = weight.detach().to(stored.device, torch.float16).contiguous()
            codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(half, 0.0)
        _bind(module, codes, scales, initialised=False)

    def grid(self, module: nn.Module, weight: Tensor) -> Grid | None:
        """Integers times the scale of each row."""
        scales = _scales(module)
        if plain(module.weight).dtype != torch.int8 or scales is None:
            return None
        scales = torch.maximum(scales.to(weight), weight.abs().amax(1))
        levels = torch.arange(-127, 128, device=weight.device, dtype=torch.float32)

        def stored(places: Tensor) -> Snapshot8bit:
            return Snapshot8bit((places.to("cpu", torch.int16) - 127).to(torch.int8), scales.cpu(), False)

        return Grid(levels, scales.view(-1, 1) * (1.0 / 127.0), stored)

    def twin(self, module: nn.Module) -> nn.Module:
        """A second layer with its own parameter and state, which share codes until another weight is stored."""
        twin: Any = super().twin(module)
        weight: Any = module.weight
        made = type(weight)(weight.data, requires_grad=False, has_fp16_weights=weight.has_fp16_weights)
        made.CB, made.SCB = weight.CB, weight.SCB
        twin._parameters["weight"], twin.state = made, copy.copy(twin.state)
        return twin

    def snapshot(self, module: nn.Module) -> Snapshot8bit:
        """Copies codes and scales to the CPU, and records whether the parameter or the state had them."""
        data = plain(module.weight)
        scales = _scales(module) if data.dtype == torch.int8 else None
        return Snapshot8bit(
            data.to("cpu", copy=True),
            None if scales is None else scales.to("cpu", copy=True),
            getattr(getattr(module, "state", None), "CB", None) is not None,
        )

    def restore(self, module: nn.Module, snapshot: Snapshot8bit) -> None:
        """Restores codes and scales on the parameter or the state, as in the snapshot."""
        if snapshot.scales is None:
            with torch.no_grad():
                plain(module.weight).copy_(snapshot.data)
            _forget(module)
            return
        device = self.device(module)
        codes, scales = (part.to(device, copy=True) for part in (snapshot.data, snapshot.scales))
        _bind(module, codes, scales, initialised=snapshot.initialised)


def _scales(module: nn.Module) -> Tensor | None:
    """Largest magnitude of each row, float32 (out,), from the parameter or the state."""
    state = getattr(module, "state", None)
    scales = getattr(state, "SCB", None)
    return getattr(module.weight, "SCB", None) if scales is None else scales


def _bind(module: nn.Module, codes: Tensor, scales: Tensor, *, initialised: bool) -> None:
    """Assigns codes and scales to the module's parameter or (``initialised``) to its state."""
    parameter: Any = module.weight
    state = getattr(module, "state", None)
    parameter.data = codes
    if state is not None:
        _forget(module)
    if initialised and state is not None:
        state.CB, state.SCB = parameter.data, scales
        parameter.CB = parameter.SCB = None
    else:
        parameter.CB, parameter.SCB = parameter.data, scales


def _forget(module: nn.Module) -> None:
    """Drops codes cached from an earlier weight."""
    state = getattr(module, "state", None)
    if state is not None:
        state.reset_grads()
