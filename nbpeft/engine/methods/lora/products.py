"""The low-rank product on a linear layer, alone or with the layer's own output, and how it is computed.

in few launches        on an accelerator, where starting a kernel costs more than a short product (``launches``)
by a lean function     on a CPU, where allocating and copying does (``autograd``)
by ordinary operations on a CPU for small inputs and without gradients
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.kernels.numerics import add_delta, autocast_dtype, compute_dtype
from nbpeft.engine.kernels.recomputed import origin_of
from nbpeft.engine.methods.lora.autograd import Factors, as_rows, lean_product, takes_pieces
from nbpeft.engine.methods.lora.launches import in_few_launches

_LEAST_LEAN = 1 << 15
"""For smaller inputs a call of a custom function takes longer than what it saves."""
_EXACT = (torch.float32, torch.float64)
"""Dtypes in which adding a product in place gives the same bits as adding it afterwards."""


def launches_count(device: torch.device) -> bool:
    """Whether starting a kernel on a device costs more than the bytes that it moves for a thin product."""
    return device.type != "cpu"


def _is_small(x: Tensor) -> bool:
    """Whether what ordinary operations save for backward is less than a call of a custom function costs.

    It is not for an input that can be recomputed, of which the custom function saves nothing.
    """
    return x.numel() < _LEAST_LEAN and origin_of(x) is None


def _records(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def low_rank_linear(x: Tensor, factors: Factors, probability: float, onto: Tensor | None = None) -> Tensor:
    """``scaling * B(A(dropout(x)))`` for a linear layer, added to ``onto`` if that is given.

    Args:
        x: (..., in), any floating dtype.
        factors: A, B and their scaling, on the device of ``x``.
        probability: probability of dropout of the input, below 1.
        onto: (..., out), a tensor to add the product to.

    Returns:
        (..., out) in the dtype of ``onto``; without that, in the autocast dtype if autocast is on, else in the
        factors' dtype.
    """
    lora_A, lora_B, scaling = factors
    dtype = compute_dtype(x, lora_A)
    if launches_count(x.device) and (onto is None or onto.device == x.device):
        return in_few_launches(x, factors, onto, None, probability, dtype)
    if _is_small(x) or (x.dtype == lora_A.dtype == dtype and not (probability or _records(x, lora_A, lora_B, onto))):
        cast = x.to(dtype)
        hidden = F.linear(F.dropout(cast, probability) if probability else cast, lora_A.to(dtype))
        delta = F.linear(hidden * scaling, lora_B.to(dtype))
        return delta if onto is None else (onto + delta.to(onto.device)).to(onto.dtype)
    if onto is not None and (onto.device != x.device or torch.promote_types(onto.dtype, dtype) != dtype):
        return add_delta(onto, low_rank_linear(x, factors, probability).to(onto.device))
    return lean_product(x, factors, onto, None, probability, dtype)


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, probability: float
) -> Tensor | None:
    """``W x + b + scaling * B(A(dropout(x)))`` in one function, whose backward needs no buffer for each summand.

    Args:
        x: (..., in).
        weight: W of a frozen layer, (out, in).
        bias: the layer's bias, (out,), or None.
        factors: A, B and their scaling.
        probability: probability of dropout of the input.

    Returns:
        (..., out), with the same bits as the layer plus ``low_rank_linear``; None if that is not guaranteed: for
        several devices and a layer that is trained; on a CPU for autocast, and for other dtypes than float32, float64,
        and factors in float32 on many tokens in bfloat16.
    """
    lora_A, lora_B, scaling = factors
    device = x.device
    together = device == weight.device == lora_A.device == lora_B.device
    alike = x.dtype == weight.dtype and lora_A.dtype == lora_B.dtype
    trained = weight.requires_grad
    if bias is not None:
        together = together and bias.device == device
        alike = alike and bias.dtype == x.dtype
        trained = trained or bias.requires_grad
    if not together or trained or probability >= 1.0:
        return None
    in_launches = launches_count(device)
    if autocast_dtype(device.type) is not None:
        if not in_launches or torch.float64 in (x.dtype, weight.dtype):  # which autocast leaves alone
            return None
    elif not alike:
        return None
    dtype = compute_dtype(x, lora_A)
    if in_launches:
        return in_few_launches(x, factors, None, (weight, bias), probability, dtype)
    if x.dtype == dtype and dtype in _EXACT:
        if _is_small(x):
            hidden = F.linear(F.dropout(x, probability) if probability else x, lora_A) * scaling
            return F.linear(x, weight, bias) + F.linear(hidden, lora_B)
        # Of two passes with one mask, as in activation checkpointing, the first may record nothing.
        if not probability and not _records(x, lora_A, lora_B):
            output, hidden = F.linear(x, weight, bias), as_rows(F.linear(x, lora_A) * scaling)
            output.view(hidden.shape[0], output.shape[-1]).addmm_(hidden, lora_B.T)
            return output
    elif not takes_pieces(x, lora_A, dtype):
        return None
    return lean_product(x, factors, None, (weight, bias), probability, dtype)
