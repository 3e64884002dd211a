"""What all backends share: where a weight lies and what it takes follow from its tensors."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _set_obj_state

from nbpeft.errors import MergeError

_BACKENDS = {"dense": "", "bnb4bit": "bnb 4bit", "bnb8bit": "bnb 8bit"}
"""PEFT's names of the ways to store a weight, where they differ."""
_HELD = ("_parameters", "_buffers", "_modules")


class StoredWeight:
    """Base class of backends; see ``nbpeft.engine.contract.base.Backend`` for the contract.

    A subclass gives ``name``, ``matches``, ``dtype``, ``dequantize``, ``store``, ``snapshot``,
    ``restore`` and ``tensors``.
    """

    name: str
    peft_name: str = ""
    priority: int = 100
    """Backends of higher priority are asked first; a dense weight is the last guess."""
    can_merge: bool = True
    unmergeable_reason: str = ""

    @property
    def backend_name(self) -> str:
        """PEFT's name of the quantization; empty for a weight that is not quantized."""
        return _BACKENDS.get(self.name, self.name)

    def prepare(self, module: nn.Module) -> bool:
        """Called on every module of a model that gets its first adapter. Idempotent; most need nothing.

        Returns:
            Whether ``release`` is to be called once the adapters are gone.
        """
        return False

    def release(self, module: nn.Module) -> None:
        """Undoes what ``prepare`` did to how the module computes, where that returned True."""

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the weight is stored in, with its quantization constants."""
        return [plain(module.weight)]

    def label(self, module: nn.Module) -> str:
        """What a person calls the way it is stored: ``bf16``, ``nf4``, ``int8``."""
        return short_name(self.tensors(module)[0].dtype)

    def twin(self, module: nn.Module) -> nn.Module:
        """A second layer like a module, with the same hooks and bias: what is stored into it leaves the first alone.

        A backend whose ``store`` writes into the tensors of a layer, instead of replacing them, gives it others.
        """
        twin: nn.Module = object.__new__(type(module))
        state = {name: dict(value) if name in _HELD else value for name, value in module.__dict__.items()}
        twin.__dict__.update(state, _compiled_call_impl=None)
        # What accelerate puts in place of a layer's forward would call the first one.
        twin.__dict__.pop("forward", None)
        return twin

    def device(self, module: nn.Module) -> torch.device:
        """Where the weight lies."""
        return self.tensors(module)[0].device

    def byte_count(self, module: nn.Module) -> int:
        """Bytes of all tensors, each storage once."""
        return sum(unique_storages(self.tensors(module)).values())


class ReadOnlyWeight(StoredWeight):
    """Base of backends whose library can compute with a weight but not store another one.

    The weight is read by sending the identity through the layer, which is right whatever the
    layout and the kernel. A subclass gives ``name``, ``matches`` and ``unmergeable_reason``.
    """

    can_merge = False

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """All parameters and buffers of the layer but its bias."""
        held = {**module._parameters, **module._buffers}
        return [plain(tensor) for name, tensor in held.items() if tensor is not None and name != "bias"]

    def label(self, module: nn.Module) -> str:
        """The name of the backend."""
        return self.name

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the scales, else float16."""
        floating = (t.dtype for t in self.tensors(module) if t.is_floating_point() and t.element_size() > 1)
        return next(floating, torch.float16)

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), a new tensor, as exact as the layer's own products."""
        holder = next((held for held in (module._parameters, module._buffers) if held.get("bias") is not None), None)
        bias = None if holder is None else holder["bias"]
        layer: Any = module
        unit = torch.eye(layer.in_features, dtype=self.dtype(module), device=self.device(module))
        try:
            if holder is not None:
                holder["bias"] = None
            with torch.no_grad():
                product: Tensor = module(unit[None])
        finally:
            if holder is not None:
                holder["bias"] = bias  # type: ignore[assignment]
        return product[0].t().contiguous()

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Always refuses.

        Raises:
            MergeError: the library cannot quantize a weight on its own.
        """
        raise MergeError(f"a {self.name} weight cannot be written: {self.unmergeable_reason}", backend=self.name)

    def snapshot(self, module: nn.Module) -> None:
        """Nothing: ``store`` changes nothing."""

    def restore(self, module: nn.Module, snapshot: None) -> None:
        """Does nothing."""


def plain(weight: Any) -> Tensor:
    """A parameter or tensor subclass as an ordinary detached tensor on the same storage."""
    tensor: Tensor = weight.detach().as_subclass(Tensor)
    return tensor


def keep_parameter_classes(module: nn.Module) -> None:
    """Lets pickle keep the classes of a module's parameters, as bitsandbytes has them, with their attributes.

    As torch pickles them they come back as plain parameters, whose deep copies have no attributes.
    """
    for kind in {type(parameter) for parameter in module._parameters.values()}:
        if nn.Parameter in kind.__mro__[1:]:
            copyreg.pickle(kind, reduced_parameter)


def reduced_parameter(parameter: Any) -> tuple[Any, ...]:
    """How to pickle a parameter of a class of its own, so that it is read back by torch alone."""
    data = (type(parameter), plain(parameter), parameter.requires_grad)
    return Tensor._make_subclass, data, dict(vars(parameter)), None, None, _set_obj_state


def inner_tensors(weight: Any) -> list[Tensor]:
    """The plain tensors that a wrapping tensor subclass stores; the tensor itself if it wraps none."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [plain(weight)]
    names, _ = weight.__tensor_flatten__()
    return [tensor for name in names for tensor in inner_tensors(getattr(weight, name))]


def moved_copy(weight: Any, device: torch.device | str) -> Any:
    """A copy of a wrapping tensor subclass on a device, bit for bit."""
    if not hasattr(weight, "__tensor_flatten__"):
        return plain(weight).to(device, copy=True)
    names, context = weight.__tensor_flatten__()
    parts = {name: moved_copy(getattr(weight, name), device) for name in names}
    return type(weight).__tensor_unflatten__(parts, context, weight.size(), weight.stride())


_SHORT = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}


def short_name(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``, ``int8``."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(dtype, name.replace("float", "fp"))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, of one that is sharded (``DTensor``); any other as it is."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def storage_of(tensor: Any) -> torch.UntypedStorage:
    """The storage of a tensor, or of the first one that it wraps: the same for all views of it."""
    while hasattr(tensor, "__tensor_flatten__"):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    found: torch.UntypedStorage = tensor.untyped_storage()
    return found


def unique_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address of each storage on a real device -> its size in bytes. Meta tensors have none."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        for part in inner_tensors(local(tensor)):
            storage = part.untyped_storage()
            if part.device.type != "meta" and storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return storages


def loaded(module_name: str, *names: str) -> tuple[type[Any], ...]:
    """Classes of an optional library, if somebody has imported it; never imports it."""
    library = sys.modules.get(module_name)
    if library is None:
        return ()
    return tuple(found for name in names if isinstance(found := getattr(library, name, None), type))
