"""Base classes of weight backends, and helpers for storages, tensor subclasses and dtypes."""

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
"""Backend -> PEFT's name of the quantization, where that differs from ``name``."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class StoredWeight:
    """Base class of backends, which derives device and size from the tensors of the weight.

    A subclass implements ``name``, ``matches``, ``dequantize``, ``store``, ``snapshot`` and ``restore`` of
    ``nbpeft.engine.contract.base.Backend``, and ``tensors`` and ``dtype`` where they are not those of ``weight``.
    """

    name: str
    peft_name: str = ""
    priority: int = 100
    """Backends of higher priority are tried first; the dense one is last."""
    can_merge: bool = True
    unmergeable_reason: str = ""

    @property
    def backend_name(self) -> str:
        """PEFT's name of the quantization; empty for a weight that is not quantized."""
        return _BACKENDS.get(self.name, self.name)

    def prepare(self, module: nn.Module) -> bool:
        """Called on every module of a model that gets its first adapter. Idempotent; most backends do nothing.

        Returns:
            Whether ``release`` must be called after the last adapter is removed.
        """
        return False

    def release(self, module: nn.Module) -> None:
        """Undoes what ``prepare`` changed in how the module computes; called only if that returned True."""

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the weight is stored in, including its quantization constants."""
        return [plain(module.weight)]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the weight, dequantized."""
        return module.weight.dtype  # type: ignore[return-value]

    def label(self, module: nn.Module) -> str:
        """The storage format as shown to users: ``bf16``, ``nf4``, ``int8``."""
        return short_name(self.tensors(module)[0].dtype)

    def twin(self, module: nn.Module) -> nn.Module:
        """A shallow copy of a layer, with the same hooks and bias; storing a weight in it does not change the layer.

        A backend whose ``store`` writes to existing tensors instead of replacing them must copy those tensors.
        """
        twin: nn.Module = object.__new__(type(module))
        state = {name: dict(value) if name in _REGISTRIES else value for name, value in module.__dict__.items()}
        twin.__dict__.update(state, _compiled_call_impl=None)
        # accelerate replaces forward on the instance; the replacement would call the original layer.
        twin.__dict__.pop("forward", None)
        return twin

    def device(self, module: nn.Module) -> torch.device:
        """The device of the weight."""
        return self.tensors(module)[0].device

    def byte_count(self, module: nn.Module) -> int:
        """Bytes of all tensors; a shared storage is counted once."""
        return sum(unique_storages(self.tensors(module)).values())


class WrappedWeight(StoredWeight):
    """Base class of backends whose ``weight`` is a tensor around others, which a new one replaces."""

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return inner_tensors(module.weight)

    def dequantize(self, module: nn.Module) -> Tensor:
        """(out, in), a new tensor."""
        weight: Any = module.weight
        with torch.no_grad():
            dense: Tensor = weight.detach().dequantize()
        return dense

    def snapshot(self, module: nn.Module) -> Any:
        """A copy on the CPU."""
        return moved_copy(module.weight.detach(), "cpu")  # type: ignore[operator]

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Replaces the weight by a copy of the snapshot."""
        self.replace(module, moved_copy(snapshot, self.device(module)))

    def replace(self, module: nn.Module, weight: Tensor) -> None:
        """Sets another tensor as the frozen weight."""
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


NEEDS_CALIBRATION = (
    "quantizing needs calibration data; keep the adapter unmerged, or merge into a full-precision copy of the base"
)
"""Why a weight that was quantized with calibration data cannot be merged into."""


class ReadOnlyWeight(StoredWeight):
    """Base class of backends whose library can compute with a weight but not quantize a new one.

    The weight is read by calling the layer with an identity matrix, which works for any memory
    layout and kernel. A subclass implements ``name``, ``matches`` and ``unmergeable_reason``.
    """

    can_merge = False

    def tensors(self, module: nn.Module) -> list[Tensor]:
        own = {**module._parameters, **module._buffers}
        return [plain(tensor) for name, tensor in own.items() if tensor is not None and name != "bias"]

    def label(self, module: nn.Module) -> str:
        return self.name

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the scales; float16 without any."""
        floating = (t.dtype for t in self.tensors(module) if t.is_floating_point() and t.element_size() > 1)
        return next(floating, torch.float16)

    def dequantize(self, module: nn.Module) -> Tensor:
        """A new tensor, (out, in), as exact as the layer's own products."""
        # Without the bias, the output for an identity matrix is the transposed weight.
        holder = next((own for own in (module._parameters, module._buffers) if own.get("bias") is not None), None)
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
        """Always raises MergeError: the library cannot quantize a new weight."""
        raise MergeError(f"a {self.name} weight cannot be written: {self.unmergeable_reason}", backend=self.name)

    def snapshot(self, module: nn.Module) -> None:
        """None, because ``store`` never changes anything."""

    def restore(self, module: nn.Module, snapshot: None) -> None:
        """Does nothing."""


def plain(weight: Any) -> Tensor:
    """A parameter or tensor subclass as an ordinary detached tensor on the same storage."""
    return weight.detach().as_subclass(Tensor)


def is_packed(parameter: Any) -> bool:
    """Whether a parameter has packed 4-bit codes of bitsandbytes, in a tensor of any dtype.

    A ``Params4bit`` is an ordinary parameter until it is quantized.
    """
    return type(parameter).__name__ == "Params4bit" and (parameter.bnb_quantized or not parameter.is_floating_point())


def keep_parameter_classes(module: nn.Module) -> None:
    """Makes pickle keep the classes and attributes of a module's parameters, such as those of bitsandbytes.

    torch itself pickles a subclass of ``nn.Parameter`` as a plain parameter, without its attributes.
    """
    for kind in {type(parameter) for parameter in module._parameters.values()}:
        if nn.Parameter in kind.__mro__[1:]:
            copyreg.pickle(kind, reduced_parameter)


def reduced_parameter(parameter: Any) -> tuple[Any, ...]:
    """The pickle reduction of a parameter subclass; unpickling it needs only torch, not nbpeft."""
    data = (type(parameter), plain(parameter), parameter.requires_grad)
    return Tensor._make_subclass, data, dict(vars(parameter)), None, None, _set_obj_state


def inner_tensors(weight: Any) -> list[Tensor]:
    """The plain tensors inside a wrapper tensor subclass; any other tensor itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [plain(weight)]
    names, _ = weight.__tensor_flatten__()
    return [tensor for name in names for tensor in inner_tensors(getattr(weight, name))]


def moved_copy(weight: Any, device: torch.device | str) -> Any:
    """Copies a wrapper tensor subclass to a device, bit for bit.

    Args:
        weight: such a tensor, or a plain one.
        device: device of the copy.

    Returns:
        The copy, of the same class.
    """
    if not hasattr(weight, "__tensor_flatten__"):
        return plain(weight).to(device, copy=True)
    names, context = weight.__tensor_flatten__()
    parts = {name: moved_copy(getattr(weight, name), device) for name in names}
    return type(weight).__tensor_unflatten__(parts, context, weight.size(), weight.stride())


_SHORT = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}


def short_name(dtype: torch.dtype) -> str:
    """The short name of a dtype: ``fp32``, ``bf16``, ``int8``."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(dtype, name.replace("float", "fp"))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a ``DTensor``; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def storage_of(tensor: Any) -> torch.UntypedStorage:
    """The storage of a tensor, or of the first tensor that it wraps; all views of a tensor have the same storage."""
    while hasattr(tensor, "__tensor_flatten__"):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return tensor.untyped_storage()


def unique_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The storages of some tensors: address -> bytes. Tensors on the meta device have none."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        for part in inner_tensors(local(tensor)):
            storage = part.untyped_storage()
            if part.device.type != "meta" and storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return storages


def loaded(module_name: str, *names: str) -> tuple[type[Any], ...]:
    """Classes of an optional library, if it was imported already; never imports it.

    Args:
        module_name: module with the classes.
        *names: names of the classes.

    Returns:
        Those that exist; empty if the module was not imported.
    """
    library = sys.modules.get(module_name)
    if library is None:
        return ()
    return tuple(found for name in names if isinstance(found := getattr(library, name, None), type))
