"""A device ``gpu:0``, ``gpu:1`` that computes on the CPU and refuses what CUDA refuses.

Its tensors wrap CPU tensors, so values and gradients are real. Tensors of two devices in one
operation raise, and what makes the host wait for the device is counted. torch keeps one such
device a process and ends that process with an abort, so it is for processes of its own that leave
by ``os._exit``. Autocast, generators and fused kernels of a GPU are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo  # imported late, it would meet the replaced functions
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
NAME = "gpu"

_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten.copy_.default, _aten._to_copy.default, _aten._foreach_copy_.default}
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default}

waits: list[str] = []
"""Operations for which the host waited for the device."""


class _Library:
    """``torch.gpu``, as far as it is asked."""

    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class GpuTensor(Tensor):
    """A tensor on the pretended device; ``raw`` holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> GpuTensor:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made: Any = Tensor._make_wrapper_subclass(cls, raw.shape, device=device, **layout)
        made.raw = raw
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.raw.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            twin = GpuTensor(self.raw.detach().clone(), self.device)
            memo[id(self)] = nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Catches what makes tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    own = [value for value in tensors if isinstance(value, GpuTensor)]
    _refuse_mixtures(func, args, tensors)
    if own and func in _WAITING:
        waits.append(func.__name__)
    asked = kwargs.get("device")
    wanted = None if asked is None else torch.device(asked)
    inner = {**kwargs, "device": "cpu"} if wanted is not None and wanted.type == NAME else kwargs
    raw_args, raw_kwargs = pytree.tree_map_only(GpuTensor, lambda value: value.raw, (args, inner))
    result = func(*raw_args, **raw_kwargs)
    if func is _aten.copy_.default:
        return args[0]
    device = wanted if wanted is not None else (own[0].device if own else torch.device("cpu"))
    if device.type != NAME or func in _WAITING - {_aten.nonzero.default}:
        return result
    device = torch.device(NAME, device.index or 0)
    known = {id(value.raw): value for value in own}

    def wrap(value: Tensor) -> Tensor:
        return known[id(value)] if id(value) in known else GpuTensor(value, device)

    wrapped = pytree.tree_map_only(Tensor, wrap, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if own else wrapped


def _refuse_mixtures(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises where CUDA would; it takes numbers, and indices, from the CPU."""
    if func in _BETWEEN_DEVICES:
        return
    indexes = "index" in func.__name__
    devices = {value.device for value in tensors if not (value.device.type == "cpu" and (indexes or not value.dim()))}
    if indexes and isinstance(args[0], Tensor):
        devices |= {value.device for value in args if isinstance(value, Tensor) and value.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found {sorted(map(str, devices))}")


@contextmanager
def pretended() -> Iterator[None]:
    """The device is there while the block runs."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Library())
    made, generator, empty_cache = torch.tensor, torch.Generator, torch.accelerator.empty_cache

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = made(*args, **kwargs)
        return found if device is None else found.to(device)

    def on_cpu(device: Any = "cpu") -> torch.Generator:
        return generator("cpu" if torch.device(device).type == NAME else device)

    replaced: Any = torch
    replaced.tensor, replaced.Generator = tensor, on_cpu
    replaced.accelerator.empty_cache = lambda: None  # the device has no allocator to empty
    try:
        with _Mode():
            yield
    finally:
        replaced.tensor, replaced.Generator = made, generator
        replaced.accelerator.empty_cache = empty_cache
