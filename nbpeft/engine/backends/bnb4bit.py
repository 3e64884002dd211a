"""bitsandbytes 4-bit weights (NF4, FP4, with or without double quantization), on CPU and accelerators.

A weight is stored in one of three layouts, and ``dequantize`` reads them all:

    plain      two codes per byte, row-major; per-block constants in ``quant_state.absmax``
    packed     on CPUs with AVX512-BF16 the first forward in eval mode re-packs the codes in blocks of 32 rows,
               rounds the constants to bfloat16 and transposes them
    half-plain ``state_dict()`` of a packed module restores the codes but leaves the constants transposed

The library's packed forward always computes in bfloat16 and has no gradient for its input, and its forward on
the half-plain layout is wrong. ``prepare`` converts a layer to the plain layout and prevents re-packing: its
outputs are those of a CPU that does not re-pack, in training and in evaluation. ``release`` allows the
library to re-pack the layer again.

The cost on a CPU with AVX512-BF16: a forward of one token takes 2.5 to 4 times as long in layers of 576 to
1,536 features, 7 times at 2,048 and 40 to 70 times in one of 2,048 x 8,192; one of 256 tokens takes 0.7 to 0.9 times
as long in bfloat16 and 1.4 to 2.3 times in float32. For training there is no alternative.

References: QLoRA, https://arxiv.org/abs/2305.14314; layouts as in bitsandbytes 0.46 to 0.50.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import register_backend
from nbpeft.engine.kernels.four_bit import NESTED_BLOCK, fitted, in_blocks
from nbpeft.engine.kernels.nf4_rounding import round_blocks
from nbpeft.engine.kernels.rounding import Grid
from nbpeft.engine.kernels.storage import StoredWeight, keep_parameter_classes, loaded, plain

PACKED_ROWS = 32
_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of a linear layer: whether its forward re-packs the weight."""


@dataclass(frozen=True)
class Snapshot4bit:
    """The codes and a private copy of the quantization state, both on the CPU."""

    data: Tensor
    state: Any


@register_backend
class Bnb4bit(StoredWeight):
    """``bitsandbytes.nn.Linear4bit`` and ``Embedding4bit``."""

    name = "bnb4bit"
    peft_name = "Linear4bit"

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is one of the library's 4-bit layers, already quantized or not."""
        return isinstance(module, loaded("bitsandbytes.nn", "Linear4bit", "Embedding4bit"))

    def prepare(self, module: nn.Module) -> bool:
        """Converts the weight to the plain layout and prevents re-packing, in training and in evaluation.

        Returns:
            Whether ``release`` allows the library to re-pack it. A weight of a shape that the library cannot re-pack,
            so that its next evaluation would fail, stays plain.
        """
        keep_parameter_classes(module)
        _make_plain(module)
        if not getattr(module, _REPACKS, False):
            return False
        setattr(module, _REPACKS, False)
        state = _state(module)
        return state is None or not (state.shape[0] % PACKED_ROWS or state.shape[-1] % state.blocksize)

    def release(self, module: nn.Module) -> None:
        setattr(module, _REPACKS, True)

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """Codes, constants and code tables."""
        state = _state(module)
        if state is None:
            return [plain(module.weight)]
        parts = [plain(module.weight), state.absmax, state.code]
        if state.nested:
            parts += [state.offset, state.state2.absmax, state.state2.code]
        return parts

    def label(self, module: nn.Module) -> str:
        """``nf4`` or ``fp4``, with ``double`` if the constants are quantized, too."""
        state = _state(module)
        if state is None:
            return super().label(module)
        return f"{state.quant_type}{' double' if state.nested else ''}"

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the weight before quantization."""
        state = _state(module)
        return plain(module.weight).dtype if state is None else _original_dtype(state)

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), correct in every layout; a new tensor unless the module is not quantized yet."""
        state = _state(module)
        data = plain(module.weight)
        if state is None:
            return data
        rows, columns = state.shape
        if getattr(state, "packing_format_for_cpu", False):
            data = _unpacked(data, rows, columns)
        return _decoded(data, _constants(state), state, self.dtype(module))

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Quantizes with the module's own settings, in the plain layout.

        The constants are the least-squares fit for bitsandbytes' codes, so the error is at most
        that of constants that are the largest magnitude of each block.
        """
        old = _state(module)
        if old is None:
            with torch.no_grad():
                plain(module.weight).copy_(weight)
            return
        weight = weight.detach().to(self.device(module))
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            weight = weight.float()
        storage = getattr(module.weight, "quant_storage", torch.uint8)
        data, state = _quantized(weight.contiguous(), old, nested=_nested(module), storage=storage)
        state.dtype = _original_dtype(old)
        _bind(module, data, state)

    def grid(self, module: nn.Module, weight: Tensor) -> Grid | None:
        """The code table times the constant of each block; None if blocks extend over the ends of rows.

        bitsandbytes 0.50 dequantizes such blocks on CPUs with other constants than it quantized them with.
        """
        old = _state(module)
        if old is None or old.shape[-1] % old.blocksize:
            return None
        state = _widened(_plain_state(module), weight)
        levels, codes = state.code.float().sort(stable=True)
        scales = _constants(state).repeat_interleave(state.blocksize)[: weight.numel()].view(weight.shape)
        storage = getattr(module.weight, "quant_storage", torch.uint8)

        def stored(places: Tensor) -> Snapshot4bit:
            chosen = codes.to(torch.uint8)[places.int()].view(-1)
            chosen = nn.functional.pad(chosen, (0, chosen.numel() % 2))
            data = ((chosen[0::2] << 4) | chosen[1::2]).view(storage).view(-1, 1)
            kept = copy.deepcopy(state)
            kept.to("cpu")
            return Snapshot4bit(data.cpu(), kept)

        return Grid(levels, scales, stored)

    def twin(self, module: nn.Module) -> nn.Module:
        """A second layer, whose parameter shares codes and state with the first until a weight is stored."""
        twin = super().twin(module)
        weight: Any = copy.copy(module.weight)
        weight.module = twin
        twin._parameters["weight"] = weight
        return twin

    def snapshot(self, module: nn.Module) -> Snapshot4bit:
        """Codes and state in their current layout."""
        state = copy.deepcopy(_state(module))
        if state is not None:
            state.to("cpu")
        return Snapshot4bit(plain(module.weight).to("cpu", copy=True), state)

    def restore(self, module: nn.Module, snapshot: Snapshot4bit) -> None:
        """Restores codes and state in the layout of the snapshot; a later forward re-packs them if needed."""
        if snapshot.state is None:
            with torch.no_grad():
                plain(module.weight).copy_(snapshot.data)
            return
        state = copy.deepcopy(snapshot.state)
        state.to(self.device(module))
        _bind(module, snapshot.data.to(self.device(module), copy=True), state)


def store_codes_as(module: nn.Module, dtype: torch.dtype) -> None:
    """Changes the dtype of the tensor that has the codes; its bits stay the same.

    Args:
        module: a quantized layer in the plain layout.
        dtype: the new dtype; the number of bytes must be a multiple of its size.
    """
    for owner in (module, module.weight):
        if hasattr(owner, "quant_storage"):
            vars(owner)["quant_storage"] = dtype
    parameter = module.weight
    _bind(module, plain(parameter).view(-1).view(torch.uint8).view(dtype).view(-1, 1), _state(module))


def _state(module: nn.Module) -> Any:
    """The quantization state, or None before the weight is quantized; with FSDP only the module has it."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _make_plain(module: nn.Module) -> None:
    """Converts codes and constants to the plain layout, without changing the dequantized weight."""
    state = _state(module)
    if state is None or not hasattr(state, "packing_format_for_cpu"):
        return
    data = plain(module.weight)
    if state.packing_format_for_cpu:
        storage = getattr(state, "original_storage_type", torch.uint8)
        data = _unpacked(data, *state.shape).view(-1).view(storage).view(-1, 1)
    elif state.absmax.dim() == 1:
        return
    state.absmax, state.dtype, state.packing_format_for_cpu = _constants(state), _original_dtype(state), False
    _bind(module, data, state)


def _original_dtype(state: Any) -> torch.dtype:
    packed = getattr(state, "packing_format_for_cpu", False)
    return state.original_dtype if packed else state.dtype


def _nested(module: nn.Module) -> bool:
    """Whether the constants are quantized; re-packing removes this from the state, but not from the parameter."""
    setting = getattr(module.weight, "compress_statistics", None)
    return bool(_state(module).nested if setting is None else setting)


def _constants(state: Any) -> Tensor:
    """The largest magnitude of every block in row-major order, float32, (blocks,)."""
    absmax: Tensor = state.absmax
    if state.nested:
        inner = state.state2
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax, inner.absmax, inner.code, inner.blocksize, inner.dtype
        )
        absmax = absmax + state.offset
    elif absmax.dim() == 2:
        absmax = absmax.t()
    return absmax.reshape(-1).float()


def _decoded(data: Tensor, constants: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Codes times constants, with the shape and block size of ``state``."""
    kernel = torch.ops.bitsandbytes.dequantize_4bit.default
    odd = state.shape[-1] % 2 != 0
    # For rows of odd length the CPU kernel compiles a slow fallback; as one flat row the length is even.
    shape = (2 * data.numel() * data.element_size(),) if odd else state.shape
    weight: Tensor = kernel(data, constants, state.blocksize, state.quant_type, shape, dtype)
    return weight.reshape(-1)[: state.shape.numel()].view(state.shape) if odd else weight


def _unpacked(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Codes of the packed layout in row-major order, two per byte, uint8 (rows * columns / 2, 1).

    A packed byte of block b, column pair k and lane j = 2 n + p holds the codes of rows n (low half)
    and 16 + n (high half) in column 2 k + p.
    """
    half = PACKED_ROWS // 2
    lanes = packed.view(torch.uint8).view(rows // PACKED_ROWS, columns // 2, half, 2)
    even, odd = lanes[..., 0], lanes[..., 1]
    plain = torch.empty((rows // PACKED_ROWS, 2, half, columns // 2), dtype=torch.uint8, device=packed.device)
    plain[:, 0] = (((even & 0x0F) << 4) | (odd & 0x0F)).transpose(1, 2)
    plain[:, 1] = ((even & 0xF0) | (odd >> 4)).transpose(1, 2)
    return plain.view(-1, 1)


def _quantized(weight: Tensor, like: Any, *, nested: bool, storage: torch.dtype) -> tuple[Tensor, Any]:
    """Codes and state for a weight, with the block size and type of ``like``."""
    functional = sys.modules["bitsandbytes"].functional
    kind = {"blocksize": like.blocksize, "quant_type": like.quant_type}
    if weight.device.type == "cpu":
        data, constants = round_blocks(weight, like.blocksize, like.code.float())
        data = data.view(-1).view(storage).view(-1, 1)
        state = functional.QuantState(constants, shape=weight.shape, dtype=weight.dtype, code=like.code, **kind)
    else:
        data, state = functional.quantize_4bit(weight, compress_statistics=False, quant_storage=storage, **kind)
        state.absmax = fitted(weight, data, state.absmax, state.blocksize, state.quant_type)
    if nested:
        _nest(state)
    return data, state


def _nest(state: Any) -> None:
    """Quantizes the constants of a state."""
    offset = state.absmax.mean()
    quantize = sys.modules["bitsandbytes"].functional.quantize_blockwise
    state.absmax, state.state2 = quantize(state.absmax - offset, blocksize=NESTED_BLOCK)
    state.offset = offset
    state.nested = True


def _plain_state(module: nn.Module) -> Any:
    """A copy of the quantization state for the plain layout, with the same constants up to rounding."""
    old = _state(module)
    state = copy.deepcopy(old)
    if hasattr(state, "packing_format_for_cpu"):
        state.absmax, state.dtype, state.nested = _constants(old), _original_dtype(old), False
        state.packing_format_for_cpu = False
        if _nested(module):
            _nest(state)
    return state


def _widened(state: Any, weight: Tensor) -> Any:
    """The state, with larger constants for blocks of the weight that need them."""
    constants = _constants(state)
    needed = in_blocks(weight.reshape(-1), state.blocksize).abs().amax(1)
    if bool((needed > constants).any()):
        nested = state.nested
        state.absmax, state.nested = torch.maximum(needed, constants), False
        if nested:
            _nest(state)
    return state


def _bind(module: nn.Module, data: Tensor, state: Any) -> None:
    """Assigns codes and state to the module, keeping the parameter object."""
    parameter: Any = module.weight
    parameter.data = data
    # bitsandbytes has the state twice: forward reads the parameter's, and takes the layer's where FSDP lost that one.
    if hasattr(parameter, "quant_storage"):
        parameter.quant_state = state
        parameter.bnb_quantized = True
    if hasattr(module, "quant_state"):
        module.quant_state = state
