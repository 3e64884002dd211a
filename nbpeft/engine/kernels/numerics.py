"""Arithmetic that layers and methods share: dtypes, in-place sums, checks for finite values and for changed tensors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def fits(factor: float, dtype: torch.dtype) -> bool:
    """Whether torch's in-place sums accept a factor (``alpha``) for a dtype: it must be within the dtype's range."""
    return abs(factor) <= torch.finfo(dtype).max


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least float32, because LAPACK and cuSOLVER do not support half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cayley(skew: Tensor) -> Tensor:
    """The Cayley transform: rotations ``(I - Q) (I + Q)⁻¹`` of skew-symmetric matrices (…, b, b), in their dtype."""
    wide = widened(skew)
    identity = torch.eye(wide.shape[-1], device=wide.device, dtype=wide.dtype)
    rotations: Tensor = torch.linalg.solve(identity + wide, identity - wide, left=False)
    return rotations.to(skew.dtype)


def neumann_cayley(skew: Tensor, terms: int) -> Tensor:
    """An approximate Cayley transform: ``(I + Q) (I - Q)⁻¹`` as I + 2 Q + 2 Q² + … + Qⁿ, by the Neumann series.

    Args:
        skew: skew-symmetric matrices Q, (…, b, b).
        terms: number of terms of the sum.

    Returns:
        (…, b, b) in the dtype of ``skew``.
    """
    total = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


@torch.no_grad()
def bytes_of(tensor: Tensor) -> bytes:
    """The content of a tensor of any dtype, also of those that NumPy lacks, such as bfloat16."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor contains neither NaN nor infinity."""
    # A sum is fast, and finite only if all its terms are. It may also overflow, so then look at every number.
    tensor = tensor if tensor.element_size() > 1 else tensor.float()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


def add_scaled_(weight: Tensor, delta: Tensor, scale: float) -> None:
    """Adds ``scale * delta`` to a weight in place; a result beyond the range of its dtype becomes infinite.

    Args:
        weight: any shape.
        delta: of the same shape.
        scale: factor on ``delta``.
    """
    if fits(scale, weight.dtype):
        weight.add_(delta, alpha=scale)
    else:
        weight.add_(delta * scale)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights that are not quantized."""


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which an adapter computes: that of autocast if it is on, else that of its own weight.

    Args:
        x: the layer's input; autocast is looked up for its device.
        weight: a parameter of the adapter.
    """
    return autocast_dtype(x.device.type) or weight.dtype


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device; None if it is off, and on ``meta``, where torch does not tell."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


_ONEDNN_ASKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_onednn: Any = torch.backends.mkldnn


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes a CPU's matrix products in a half-precision dtype."""
    if dtype not in _ONEDNN_ASKS or not _onednn.is_available() or not getattr(_onednn, "enabled", True):
        return False
    is_supported: Any = getattr(torch.ops.mkldnn, _ONEDNN_ASKS[dtype], None)
    return is_supported is not None and bool(is_supported())


def composes() -> bool:
    """Whether to compute with ordinary operations instead of custom autograd functions.

    ``torch.compile`` decides itself what to store for backward; tracers, torch.func's transforms
    (grad, vmap, jvp, …) and forward-mode derivatives support ordinary operations only.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context manager: turns autocast off if it is on.

    If it is off nothing is entered, which is faster and leaves no state that an interruption could keep.
    """
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


def summed(scalars: Iterable[Tensor]) -> Tensor | None:
    """The sum of scalars, on the device of the first; None if there are none."""
    terms = [*scalars]
    return sum((term.to(terms[0].device) for term in terms[1:]), terms[0]) if terms else None


def stamp(tensor: Tensor, *, deep: bool = False) -> Any:
    """A value that changes when the tensor is written to.

    Args:
        tensor: any tensor.
        deep: also sum a tensor on the CPU, because the version counter misses writes through ``.data``.

    Returns:
        To be compared with an earlier value; None for an inference tensor, which has no version counter.
    """
    if tensor.is_inference():
        return None
    total = float(tensor.sum()) + float(tensor[(0,) * tensor.ndim]) if deep and tensor.device.type == "cpu" else 0.0
    return tensor.data_ptr(), tensor._version, total


class _AddDelta(torch.autograd.Function):
    """``output + delta`` in the dtype of ``output``, for two different dtypes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, delta: Tensor) -> Tensor:
        ctx.dtypes = output.dtype, delta.dtype
        wide = torch.promote_types(output.dtype, delta.dtype)
        total = output.to(wide) if output.dtype != wide else output.clone()
        return total.add_(delta).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        of_output, of_delta = ctx.dtypes
        return gradients[0].to(of_output), gradients[0].to(of_delta)


def add_delta(output: Tensor, delta: Tensor) -> Tensor:
    """``output + delta`` in the dtype of ``output``, added in the wider of both dtypes.

    On a CPU adding tensors of two dtypes is many times slower than casting one of them first,
    and autograd would cast the gradient of the output up and down again.

    Args:
        output: any shape.
        delta: of the same shape.

    Returns:
        A new tensor.
    """
    if output.dtype == delta.dtype:
        return output + delta
    if composes():
        return (output + delta).to(output.dtype)
    return _AddDelta.apply(output, delta)
