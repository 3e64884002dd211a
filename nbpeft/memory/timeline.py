"""Runs a step on fake tensors and records what would be allocated, operation by operation.

Fake tensors have shapes, dtypes and a device but no data, so a step of a model of any size runs
in a fraction of a second and every operation still takes the path it takes on real ones. What is
counted is the life of each storage, from the operation that returns it until nothing refers to
it: the same as the allocator sees, but for scratch space inside a single kernel.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nbpeft.memory.processor import onednn_multiplies
from nbpeft.memory.saved import SavedTensors, tensors_in

_ONE: dict[torch.dtype, Any] = {torch.bool: True, torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1.0}


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
def fake_tensors(on_cpu: bool = False) -> Iterator[None]:
    """Inside it, new tensors are fake: shapes without data.

    Args:
        on_cpu: whether the real ones would be on a CPU, some of whose kernels copy what they read.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _Numbers(on_cpu):
        yield


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers code that reads a number from a tensor: nothing exceptional is there, all tokens count.

    ``any(…)`` reads as False, other truths as True, numbers (seeds, lengths) as one.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_cpu = on_cpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if getattr(args[0], "_asks_for_any", False) else _ONE.get(args[0].dtype, 1)
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.any:
            result._asks_for_any = True
        elif self._on_cpu and func is torch.ops.aten.bmm.default:
            result._copied_bytes = _repeated_bytes(args[1])
        return result


def record(model: nn.Module, step: Callable[[], Any], phases: int = 1) -> list[Peak]:
    """Runs ``step`` and finds its peak, phase by phase.

    Args:
        model: the fake model the step runs; its parameters and buffers count as there before.
        step: forward, or forward and backward.
        phases: in how many parts of equally many finished gradients to look; with one a layer
            the first is forward, loss and the last layer's backward, the last one the first
            layer's.
    """
    before = [*model.parameters(), *model.buffers()]
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    gradients: list[int] = []
    with SavedTensors(model) as saved, finished_gradients(model, gradients.append):
        allocations = Allocations(before, saved, gradients, trained, phases)
        with allocations:
            result = step()
            held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(result)}
    return [dataclasses.replace(peak, result=sum(held.values())) for peak in allocations.peaks]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation returns until it is freed."""

    def __init__(
        self, before: Iterable[Tensor], saved: SavedTensors, gradients: list[int], trained: int, phases: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peaks = [Peak(0, 0, 0)] * phases
        self._saved = saved
        self._gradients = gradients
        self._trained = max(trained, 1)
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            promoted = _promoted_bytes(args, result) if func.overloadpacket in _ARITHMETIC else 0
            self._follow(result, promoted or getattr(result, "_copied_bytes", 0))
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._follow(item)
        return result

    def _follow(self, tensor: Tensor, scratch: int = 0) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        byte_count = storage.nbytes()
        self._known.add(key)
        self.now += byte_count
        weakref.finalize(storage, self._freed, key, byte_count)
        self._risen(key, byte_count, scratch)
        phase = phase_of(len(self._gradients), self._trained, len(self.peaks))
        if self.now + scratch > self.peaks[phase].total:
            self.peaks[phase] = Peak(self.now + scratch, self._saved.byte_count, sum(self._gradients))

    def _risen(self, key: int, byte_count: int, scratch: int) -> None:
        """For subclasses: a storage was made; ``scratch`` is what its operation needs besides, for itself."""

    def _freed(self, key: int, byte_count: int) -> None:
        self._known.discard(key)
        self.now -= byte_count


def phase_of(finished: int, trained: int, phases: int) -> int:
    """The phase of a step in which so many of the gradients are finished."""
    return min(finished * phases // max(trained, 1), phases - 1)


_ARITHMETIC = frozenset(getattr(torch.ops.aten, name) for name in ("add", "sub", "mul", "div"))


def _promoted_bytes(args: tuple[Any, ...], result: Tensor) -> int:
    """Bytes of the copies that a CPU makes of inputs of another dtype than the result's."""
    others = (arg for arg in args if isinstance(arg, Tensor) and arg.dtype != result.dtype and arg.dim())
    return sum(other.numel() * result.element_size() for other in others)


def _repeated_bytes(matrices: Tensor) -> int:
    """Bytes of the copies that oneDNN's product of matrices makes of one that is repeated for each row."""
    repeated = matrices.shape[0] > 1 and matrices.stride(0) == 0
    return matrices.numel() * matrices.element_size() if repeated and onednn_multiplies(matrices.dtype) else 0


@contextmanager
def finished_gradients(model: nn.Module, tell: Callable[[int], object]) -> Iterator[None]:
    """Tells the bytes of each parameter's gradient as backward finishes it."""

    def finished(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tell(parameter.grad.nbytes)

    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(finished) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
