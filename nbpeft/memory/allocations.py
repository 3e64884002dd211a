"""Runs a step on fake tensors and records what would be allocated, operation by operation.

Fake tensors have shapes, dtypes and a device but no data, so a step of a model of any size runs
in a fraction of a second and every operation still takes the path it takes on real ones. What is
counted is the life of each storage, from the operation that returns it until nothing refers to
it: the same as the allocator sees, except for scratch space inside a single kernel.
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

from nbpeft.engine.kernels.storage import storage_of
from nbpeft.memory.processor import onednn_multiplies, product_scratch
from nbpeft.memory.saved import SavedTensors, tensors_in
from nbpeft.memory.stages import Peak, Stages

_ONE: dict[torch.dtype, Any] = {torch.bool: True, torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
_DEVICE = torch.ops.prim.device.default
_ARITHMETIC = frozenset(getattr(torch.ops.aten, name) for name in ("add", "sub", "mul", "div"))
_PLACED = frozenset(getattr(torch.ops.aten, name) for name in ("select_backward", "slice_backward"))
"""Gradients of a part of a tensor: zeros as large as the whole, which autograd sums up."""
_PRODUCTS = frozenset(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make new tensors fake: shapes without data."""
    with FakeTensorMode(allow_non_fake_inputs=True), _DefaultNumbers():  # type: ignore[no-untyped-call]
        yield


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that is never compiled, so it needs none of the guards against that around each operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _DefaultNumbers(_Mode):  # type: ignore[no-untyped-call]
    """Answers code that reads a number from a fake tensor: nothing exceptional is there, all tokens count.

    ``any(…)`` reads as False, other truths as True, numbers (seeds, lengths) as one.
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
        model: the fake model that the step runs; its parameters and buffers count as there before.
            It cannot be recorded a second time.
        step: forward, or forward and backward; gets a function to call between them.
        layers: its layers, all equal, at least three; empty where none are to be added.
        more: how many further layers like these to add.
        on_cpu: whether real tensors would be on a CPU, some of whose kernels copy what they read.

    Returns:
        None where ``layers`` were not run one after the other, so that nothing is known of further ones.
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
            held = {storage._cdata: storage.nbytes() for storage in map(storage_of, tensors_in(result))}
    return stages.peak(sum(held.values()), more)


class _Allocations(_Mode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation returns until it is freed."""

    def __init__(self, model: nn.Module, stages: Stages, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._stages = stages
        self._on_cpu = on_cpu
        self._placed: set[int] = set()
        self._known = {storage_of(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # more than half of all calls
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            scratch = 0
            if func.overloadpacket in _ARITHMETIC:
                scratch = _promoted_bytes(args, result) - self._in_place_bytes(args, result)
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
        """Count a storage that is new; ``scratch`` is what its operation needs besides, while it runs."""
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
        """Bytes of a sum of such gradients: autograd makes it in the first of them, of fake ones in a new tensor."""
        given = [arg for arg in args if isinstance(arg, Tensor)]
        if len(given) != 2 or not all(storage_of(one)._cdata in self._placed for one in given):
            return 0
        self._placed.add(storage_of(result)._cdata)
        return result.nbytes

    def _freed(self, key: int, byte_count: int) -> None:
        self._known.discard(key)
        self._placed.discard(key)
        self._stages.freed(key)
        self.total -= byte_count


def _promoted_bytes(args: tuple[Any, ...], result: Tensor) -> int:
    """Bytes of the copies that a CPU makes of inputs of another dtype than the result's."""
    others = (arg for arg in args if isinstance(arg, Tensor) and arg.dtype != result.dtype and arg.dim())
    return sum(other.numel() * result.element_size() for other in others)


def _product_bytes(left: Tensor, right: Tensor) -> int:
    """Bytes that a CPU needs while it multiplies matrices, or some pairs of them."""
    rows, depth = left.shape[-2:]
    transposed = left.stride(-2) < left.stride(-1)
    return product_scratch(rows, depth, right.shape[-1], left.dtype, transposed=transposed) if left.numel() else 0


def _repeated_bytes(matrices: Tensor) -> int:
    """Bytes of the copies that oneDNN's matrix product makes of a matrix that is repeated for each row."""
    repeated = matrices.shape[0] > 1 and matrices.stride(0) == 0
    return matrices.numel() * matrices.element_size() if repeated and onednn_multiplies(matrices.dtype) else 0
