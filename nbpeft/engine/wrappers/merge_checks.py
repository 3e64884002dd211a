"""Checks whether a layer computes ``W x + b`` with the weight that it stores, which merging requires.

A merged delta is lost if the weight is computed from other tensors in each forward. It differs from the unmerged
adapter if a hook changes the layer's input or output, or if the class has a forward that is not ``W x + b``.
"""

from __future__ import annotations

import dis
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nbpeft.engine.contract.base import BaseLayer, offloading, onloaded

_KNOWN_FORWARDS = (
    "torch.nn.modules.linear",
    "torch.nn.modules.sparse",
    "torch.nn.modules.conv",
    "transformers.pytorch_utils",
    "torch.nn.modules.module",  # no forward: a bare parameter
)
"""Modules with layer classes whose forward is known to compute ``W x + b``."""

_PLACING_HOOKS = ("accelerate.", "deepspeed.", "nbpeft.", "torch.distributed.", "transformers.")
"""Packages whose hooks move, shard or record tensors without changing their values."""

_FROM_PARTS = {"g": "weight_norm", "u": "spectral_norm", "mask": "pruning"}
"""Suffix of the tensor from which torch's older helpers compute a weight -> name of the helper."""

_RELATIVE_ERROR = {torch.float32: 3e-3, torch.float64: 1e-6}
"""Tolerance between two ways to compute the same product; float32 products may be computed in TF32."""
_HALF_RELATIVE_ERROR = 5e-2


def unmergeable_reason(base: BaseLayer, *, biased: bool = False) -> str:
    """Why merging into a layer would not have the same effect as the adapter.

    Args:
        base: the frozen layer, with its kind and backend.
        biased: whether an adapter changes the bias.

    Returns:
        A sentence for the error; empty if the effect is the same.
    """
    module = base.module
    if base.backend.device(module).type == "meta" and offloading(module) is None:
        return "its weight has no data (meta device): load the base model's weights first"
    dense = base.backend.name == "dense"
    for name in (*(("weight",) if dense else ()), *(("bias",) if biased else ())):
        derived = _derivation(module, name)
        if derived:
            return (
                f"its {name} is computed from other tensors in each forward ({derived:.60}), so a merged delta would "
                "be lost: make it an ordinary parameter first, or keep the adapter unmerged"
            )
    changing = _changing_hook(module)
    if changing:
        return (
            f"its forward hook {changing:.60} may change the layer's input or output: remove the hook first, or let "
            "it always return None"
        )
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm would shrink the merged rows: keep the adapter unmerged"
    if dense and not _maps_with_its_weight(base):
        return (
            f"the forward of {type(module).__name__:.60} does not compute W x + b, so merging would change the "
            "adapter's effect: keep it unmerged"
        )
    return ""


def _derivation(module: nn.Module, name: str) -> str:
    """Name of the function that computes a tensor of a layer from others; empty if the layer stores the tensor."""
    if name in module._parameters or name in module._buffers:
        return ""
    shown = getattr(module, name, None)
    if not isinstance(shown, Tensor) or any(shown.data_ptr() == held.data_ptr() for held in module.parameters()):
        return ""
    if parametrize.is_parametrized(module, name):
        return ", ".join(type(step).__name__.strip("_") for step in module.parametrizations[name])  # type: ignore[index]
    parts = [part for part in (*module._parameters, *module._buffers) if part.startswith(f"{name}_")]
    if parts:
        known = {f"{name}_{part}": what for part, what in _FROM_PARTS.items()}
        return next((known[part] for part in parts if part in known), ", ".join(parts))
    again: Tensor = getattr(module, name)
    return f"{name} of {type(module).__name__}" if again.data_ptr() != shown.data_ptr() else ""


def _changing_hook(module: nn.Module) -> str:
    """Name of a hook on the layer that may change its input or output; empty if there is none."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = _function_of(hook)
        owner = getattr(function, "__module__", None) or type(hook).__module__
        if not f"{owner}.".startswith(_PLACING_HOOKS) and not _returns_nothing(function):
            return str(getattr(function, "__qualname__", type(hook).__name__))
    return ""


def _function_of(hook: Any) -> Any:
    """The function behind a partial, a method or a callable object."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    return hook if hasattr(hook, "__code__") else getattr(type(hook).__call__, "__func__", type(hook).__call__)


def _returns_nothing(function: Any) -> bool:
    """Whether a function can only return None; read from its bytecode, because a call could have side effects."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return False
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return False
        if step.opname == "RETURN_VALUE":
            loads_none = before is not None and before.opname.startswith("LOAD_") and before.argval is None
            if step.is_jump_target or not loads_none:
                return False
        before = step
    return True


@torch.no_grad()
def _maps_with_its_weight(base: BaseLayer) -> bool:
    """Whether the layer computes ``W x + b``; unknown classes are tested with two rows of input."""
    module = base.module
    forward = _own_forward(module)
    if getattr(forward, "__module__", "") in _KNOWN_FORWARDS and not hasattr(forward, "__wrapped__"):
        return True
    x = _probe(base)
    devices = [x.device] if x.is_cuda else []
    # An unknown forward may draw random numbers, which must not change the draws of the user's code.
    try:
        with onloaded(module), _evaluating(module), torch.random.fork_rng(devices=devices):
            given = forward(x)
        expected = base.kind.apply(module, x, base.weight())
        if base.bias is not None:
            expected = expected + base.kind.per_channel(module, base.bias)
        error, size = (part.flatten(1).abs().amax(1) for part in (given - expected, expected))
        return bool((error <= _RELATIVE_ERROR.get(base.dtype, _HALF_RELATIVE_ERROR) * size).all())
    except Exception:  # an unknown forward may raise anything
        return False


def _own_forward(module: nn.Module) -> Callable[[Tensor], Any]:
    """The layer's forward, without accelerate's wrapper around it."""
    placed = "_hf_hook" in module.__dict__
    return module.__dict__.get("_old_forward", module.forward) if placed else module.forward


def _probe(base: BaseLayer) -> Tensor:
    """Test input without random numbers: a row, and a larger one of the opposite sign, which a clamp would change."""
    module: Any = base.module
    if base.kind.takes_ids:
        return torch.arange(min(base.in_features, 8), device=base.device)
    shape = [base.in_features]
    if hasattr(module, "kernel_size"):
        shape += [step * (size - 1) + 1 for step, size in zip(module.dilation, module.kernel_size, strict=True)]
    row = torch.sin(torch.arange(1.0, math.prod(shape) + 1.0)).view(shape)
    return torch.stack([row, row * -30.0]).to(device=base.device, dtype=base.dtype)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was = module.training
    module.training = False
    try:
        yield
    finally:
        module.training = was
