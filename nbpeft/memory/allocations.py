"""Runs a step on fake tensors and records what it would allocate, operation by operation.

Fake tensors have shape, dtype and device but no data. So a step of a model of any size runs in a
fraction of a second, and every operation takes the same code path as with real tensors. Each
storage counts from the operation that returns it until nothing refers to it any more. This is what
the allocator sees, except for scratch space inside a single kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nbpeft.engine.kernels.numerics import onednn_multiplies
from nbpeft.engine.kernels.storage import storage_of
from nbpeft.memory.processor import product_scratch
from nbpeft.memory.saved import SavedTensors, tensors_in
from nbpeft.memory.stages import Peak, Stages

_ONE: dict[torch.dtype, Any] = {torch.bool: True, torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
_DEVICE = torch.ops.prim.device.default
_ARITHMETIC = frozenset(getattr(torch.ops.aten, name) for name in ("add", "sub", "mul", "div"))
_PLACED = frozenset(getattr(torch.ops.aten, name) for name in ("select_backward", "slice_backward"))
"""Operations that return the gradient of a part of a tensor as zeros of the whole tensor's size; autograd adds them."""
_PRODUCTS = frozenset(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"))


class _Mode(TorchDispatchMode):
    """A dispatch mode without torch's slow check, around each operation, whether it is being compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _FakeTensors(_Mode, FakeTensorMode):
    """Makes tensors that are created in the block fake."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make tensors that are created in the block fake."""
    with _FakeTensors(allow_non_fake_inputs=True), _DefaultNumbers():
        yield


class _DefaultNumbers(_Mode):
    """Returns a default to code that reads a number from a fake tensor, which has no data.

    The result of ``any(…)`` reads as False (nothing exceptional), other booleans as True (all tokens count), numbers
    (seeds, lengths) as 1.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if getattr(args[0], "_is_any", False) else _ONE.get(args[0].dtype, 1)
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.any:
            result._is_any = True
        return result


def record(
    model: nn.Module,
    step: Callable[[Callable[[], None]], Any],
    layers: Sequence[nn.Module] = (),
    more: int = 0,
    *,
    on_cpu: bool = False,
) -> Peak | None:
    """Run a step and find its peak.

    Args:
        model: the fake model that the step runs; its parameters and buffers do not count. A model can be recorded
            only once, because the hooks are not removed.
        step: runs forward, or forward and backward; gets a function to call between them.
        layers: the model's layers, at least three and all equal; empty if no layers are added.
        more: number of further equal layers for which the peak is extrapolated.
        on_cpu: whether real tensors would be on a CPU, where some kernels copy their inputs.

    Returns:
        The peak; None if ``layers`` were not run one after the other, so that it cannot be extrapolated.
    """
    gradients: list[int] = []

    def finished(parameter: Any) -> None:
        gradients.append(parameter.grad.nbytes)
        stages.finished(parameter)

    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(finished)
    with SavedTensors(model) as saved:
        stages = Stages(layers, lambda: Peak(tracker.total, saved.byte_count, sum(gradients)))
        tracker = _Allocations(model, stages, on_cpu)
        with tracker:
            result = step(stages.backward_begins)
            sizes = {storage._cdata: storage.nbytes() for storage in map(storage_of, tensors_in(result))}
    return stages.peak(sum(sizes.values()), more)


class _Allocations(_Mode):
    """Tracks every storage that an operation returns until it is freed."""

    def __init__(self, model: nn.Module, stages: Stages, on_cpu: bool) -> None:
        super().__init__()
        self.total = 0
        self._stages = stages
        self._on_cpu = on_cpu
        self._placed: set[int] = set()
        self._known = {storage_of(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # a shortcut: more than half of all calls
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            scratch = 0
            if func.overloadpacket in _ARITHMETIC:
                into = "out" in (kwargs or {})
                scratch = _promoted_bytes(args, result, into=into) - self._in_place_bytes(args, result)
            elif self._on_cpu and func.overloadpacket in _PRODUCTS:
                left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
                scratch = _product_bytes(left, right) + (_repeated_bytes(right) if right.dim() == 3 else 0)
            self._follow(result, scratch)
            if func.overloadpacket in _PLACED:
                self._placed.add(storage_of(result)._cdata)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._follow(item)
        return result

    def _follow(self, tensor: Tensor, scratch: int = 0) -> None:
        """Count a new storage; ``scratch`` is the temporary memory of its operation in bytes."""
        storage = storage_of(tensor)
        key = storage._cdata
        if key in self._known:
            self._stages.reached(self.total + scratch)
            return
        byte_count = storage.nbytes()
        self._known.add(key)
        self.total += byte_count
        weakref.finalize(storage, self._freed, key, byte_count)
        self._stages.allocated(key, byte_count, self.total + scratch)

    def _in_place_bytes(self, args: tuple[Any, ...], result: Tensor) -> int:
        """Return the bytes to deduct for a sum of two placed gradients, or 0.

        Autograd adds real gradients in place, but fake ones into a new tensor.
        """
        operands = [arg for arg in args if isinstance(arg, Tensor)]
        if len(operands) != 2 or not all(storage_of(operand)._cdata in self._placed for operand in operands):
            return 0
        self._placed.add(storage_of(result)._cdata)
        return result.nbytes

    def _freed(self, key: int, byte_count: int) -> None:
        self._known.discard(key)
        self._placed.discard(key)
        self._stages.freed(key)
        self.total -= byte_count


def _promoted_bytes(args: tuple[Any, ...], result: Tensor, *, into: bool) -> int:
    """Return the bytes of the copies that are made of inputs whose dtype is not the result's.

    With ``out``, inputs of one dtype have a result in that dtype, which is copied.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
    dtypes = {tensor.dtype for tensor in tensors}
    if into and len(dtypes) == 1 and result.dtype not in dtypes:
        return result.numel() * tensors[0].element_size()
    return sum(tensor.numel() * result.element_size() for tensor in tensors if tensor.dtype != result.dtype)


def _product_bytes(left: Tensor, right: Tensor) -> int:
    """Return the temporary memory in bytes of a matrix product, also a batched one, on a CPU."""
    rows, depth = left.shape[-2:]
    transposed = left.stride(-2) < left.stride(-1)
    return product_scratch(rows, depth, right.shape[-1], left.dtype, transposed=transposed) if left.numel() else 0


def _repeated_bytes(matrices: Tensor) -> int:
    """Return the bytes that oneDNN copies of a batched matrix that is expanded from a single one (stride 0)."""
    repeated = matrices.shape[0] > 1 and matrices.stride(0) == 0
    return matrices.numel() * matrices.element_size() if repeated and onednn_multiplies(matrices.dtype) else 0
