"""Arithmetic that layers and methods share: dtypes, sums in place, finite numbers, whether a tensor has changed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def fits(factor: float, dtype: torch.dtype) -> bool:
    """Whether torch's in-place sums take a factor (``alpha``) on tensors of a dtype: not one beyond its range."""
    return abs(factor) <= torch.finfo(dtype).max


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: LAPACK and cuSOLVER have nothing for half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cayley(skew: Tensor) -> Tensor:
    """The rotations ``(I - Q) (I + Q)⁻¹`` of skew-symmetric matrices (…, b, b), in their dtype."""
    wide = widened(skew)
    identity = torch.eye(wide.shape[-1], device=wide.device, dtype=wide.dtype)
    rotations: Tensor = torch.linalg.solve(identity + wide, identity - wide, left=False)
    return rotations.to(skew.dtype)


def neumann_cayley(skew: Tensor, terms: int) -> Tensor:
    """``(I + Q) (I - Q)⁻¹``, (…, b, b), with the first terms of the inverse's series: I + 2 Q + 2 Q² + … + Qⁿ."""
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
def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinite numbers."""
    # A sum is fast and only finite if all that is added is; a large one may overflow by itself.
    tensor = tensor if tensor.element_size() > 1 else tensor.float()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


def add_scaled_(weight: Tensor, delta: Tensor, scale: float) -> None:
    """Adds ``scale * delta`` to a weight of the same shape in place; beyond a dtype's range that is infinite."""
    if fits(scale, weight.dtype):
        weight.add_(delta, alpha=scale)
    else:
        weight.add_(delta * scale)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes in which a weight is stored as what it is."""


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype an adapter computes in: autocast's where it is on, else the weight's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def composes() -> bool:
    """Whether ordinary operations are wanted instead of our own autograd functions.

    The compiler decides by itself what to keep and what to compute again; tracers, torch.func's
    transforms (grad, vmap, jvp, …) and forward-mode derivatives see through ordinary operations alone.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turns autocast off for a block, where it is on: it costs less not to, and no interruption can leave it off."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def summed(scalars: Iterable[Tensor]) -> Tensor | None:
    """The sum of scalars, on the device of the first; None without any."""
    found = [*scalars]
    return sum((one.to(found[0].device) for one in found[1:]), found[0]) if found else None


def stamp(tensor: Tensor, *, deep: bool = False) -> Any:
    """Changes when the tensor does; None where that cannot be told.

    The version counter misses writes through ``.data``, so small host tensors are summed too.
    """
    if tensor.is_inference():
        return None
    total = float(tensor.sum()) + float(tensor[(0,) * tensor.ndim]) if deep and tensor.device.type == "cpu" else 0.0
    return tensor.data_ptr(), tensor._version, total


class _AddDelta(torch.autograd.Function):
    """output + delta in the output's dtype, where the two differ."""

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
    """``output + delta`` in the output's dtype, summed in the wider of the two.

    Adding tensors of two dtypes at once is many times slower on a CPU than casting one of them
    first, and autograd would cast the gradient of the output up and down again.
    """
    if output.dtype == delta.dtype:
        return output + delta
    if composes():
        return (output + delta).to(output.dtype)
    return _AddDelta.apply(output, delta)  # type: ignore[no-any-return, no-untyped-call]
