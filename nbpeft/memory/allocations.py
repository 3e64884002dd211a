"""Runs a step on fake tensors and records what would be allocated, operation by operation.

Fake tensors have shapes, dtypes and a device but no data, so a step of a model of any size runs
in a fraction of a second and every operation still takes the path it takes on real ones. What is
counted is the life of each storage, from the operation that returns it until nothing refers to
it: the same as the allocator sees, except for scratch space inside a single kernel.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nbpeft.memory.processor import onednn_multiplies
from nbpeft.memory.saved import SavedTensors, tensors_in

_ONE: dict[torch.dtype, Any] = {torch.bool: True, torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}
_ARITHMETIC = frozenset(getattr(torch.ops.aten, name) for name in ("add", "sub", "mul", "div"))


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is allocated, beyond what was there before it.

    Attributes:
        total: all bytes at that moment.
        saved: of these, kept for backward.
        gradients: of these, gradients of parameters.
        result: bytes of the tensors that the step's result still holds at its end.
    """

    total: int
    saved: int
    gradients: int
    result: int = 0


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make new tensors fake: shapes without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _DefaultNumbers():  # type: ignore[no-untyped-call]
        yield


class _DefaultNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


def record(model: nn.Module, step: Callable[[], Any], phases: int = 1, *, on_cpu: bool = False) -> list[Peak]:
    """Run a step and find its peak, phase by phase.

    Args:
        model: the fake model that the step runs; its parameters and buffers count as there before.
            It cannot be recorded a second time.
        step: forward, or forward and backward.
        phases: how many parts, of equally many finished gradients each, to distinguish. With one part
            a layer the first is forward, loss and the last layer's backward, and the last one is the
            first layer's backward.
        on_cpu: whether real tensors would be on a CPU, some of whose kernels copy what they read.
    """
    gradients: list[int] = []
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda done: gradients.append(done.grad.nbytes))
    with SavedTensors(model) as saved:

        def now(total: int) -> tuple[int, Peak]:
            """The current phase, and what is allocated in it."""
            phase = min(len(gradients) * phases // max(len(trained), 1), phases - 1)
            return phase, Peak(total, saved.byte_count, sum(gradients))

        tracker = _Allocations(model, now, phases, on_cpu)
        with tracker:
            result = step()
            held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(result)}
    return [dataclasses.replace(peak, result=sum(held.values())) for peak in tracker.peaks]


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation returns until it is freed."""

    def __init__(self, model: nn.Module, now: Callable[[int], tuple[int, Peak]], phases: int, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks = [Peak(0, 0, 0)] * phases
        self._now = now
        self._on_cpu = on_cpu
        self._total = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            scratch = 0
            if func.overloadpacket in _ARITHMETIC:
                scratch = _promoted_bytes(args, result)
            elif self._on_cpu and func is torch.ops.aten.bmm.default:
                scratch = _repeated_bytes(args[1])
            self._follow(result, scratch)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._follow(item)
        return result

    def _follow(self, tensor: Tensor, scratch: int = 0) -> None:
        """Count a storage that is new; ``scratch`` is what its operation needs besides, while it runs."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        byte_count = storage.nbytes()
        self._known.add(key)
        self._total += byte_count
        weakref.finalize(storage, self._freed, key, byte_count)
        phase, peak = self._now(self._total + scratch)
        if peak.total > self.peaks[phase].total:
            self.peaks[phase] = peak

    def _freed(self, key: int, byte_count: int) -> None:
        self._known.discard(key)
        self._total -= byte_count


def _promoted_bytes(args: tuple[Any, ...], result: Tensor) -> int:
    """Bytes of the copies that a CPU makes of inputs of another dtype than the result's."""
    others = (arg for arg in args if isinstance(arg, Tensor) and arg.dtype != result.dtype and arg.dim())
    return sum(other.numel() * result.element_size() for other in others)


def _repeated_bytes(matrices: Tensor) -> int:
    """Bytes of the copies that oneDNN's matrix product makes of a matrix that is repeated for each row."""
    repeated = matrices.shape[0] > 1 and matrices.stride(0) == 0
    return matrices.numel() * matrices.element_size() if repeated and onednn_multiplies(matrices.dtype) else 0
