"""What the engine asks of a kind of layer and of a way to store its weight.

LayerKind   one kind of layer that can be adapted (Linear, Conv1D, Embedding, …)
Composite   one whose modules compute with several weights themselves (MultiheadAttention)
Backend     one way a weight is stored (dense, bitsandbytes 4-bit, …)
BaseLayer   what an adapter may see of the layer it sits on: its kind and backend, joined
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


class Backend(Protocol):
    """One way a weight is stored. Stateless; one instance serves all modules.

    ``matches`` must not import the optional library it speaks of: look in ``sys.modules``.
    """

    name: str
    peft_name: str
    """PEFT's name of an adapted layer with such a weight, ``Linear4bit``; empty where the kind of layer gives it."""
    can_merge: bool
    unmergeable_reason: str
    """Why ``can_merge`` is False, for the error's message; empty otherwise."""

    @property
    def backend_name(self) -> str:
        """PEFT's name of the quantization, ``bnb 4bit``; empty for a weight that is not quantized."""
        ...

    def matches(self, module: nn.Module) -> bool:
        """Whether this backend reads the module's weight."""
        ...

    def prepare(self, module: nn.Module) -> bool:
        """Prepares a module of a model that gets its first adapter. Idempotent.

        Returns:
            Whether ``release`` is to be called once the adapters are gone.
        """
        ...

    def release(self, module: nn.Module) -> None:
        """Undoes ``prepare``, where that returned True."""
        ...

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the weight is stored in, with its quantization constants."""
        ...

    def label(self, module: nn.Module) -> str:
        """What a person calls the way it is stored: ``bf16``, ``nf4``, ``int8``."""
        ...

    def device(self, module: nn.Module) -> torch.device:
        """Where the weight lies."""
        ...

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The floating dtype the weight stands for (what ``dequantize`` returns)."""
        ...

    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight as a floating tensor in the module's own orientation, detached.

        Right at any time, also after a forward has re-packed the storage. A dense backend
        returns the stored tensor itself, so writing in place changes the module.
        """
        ...

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Puts a floating weight (own orientation) into the module, quantizing as it was."""
        ...

    def snapshot(self, module: nn.Module) -> Any:
        """A copy of everything ``store`` changes, kept off the accelerator."""
        ...

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Puts a snapshot back, bit for bit."""
        ...

    def byte_count(self, module: nn.Module) -> int:
        """Bytes the stored weight takes, with its quantization constants."""
        ...


class LayerKind(Protocol):
    """One kind of layer that can be adapted. Stateless.

    The canonical weight is (out, in) or (out, in / groups, *kernel): every method's maths is
    written for it, whatever the module stores.
    """

    name: str
    peft_name: str
    """PEFT's name of an adapted layer of this kind: ``Linear``, ``Embedding``, ``Conv2d``."""
    is_linear: bool
    """Whether it is a matrix product over the input's last dimension."""
    takes_ids: bool
    """Whether its input is indices of columns of the canonical weight instead of features."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this kind (quantized versions included)."""
        ...

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in, out) features."""
        ...

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        """Shape of the canonical weight."""
        ...

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A view of a weight in the module's orientation as the canonical one; its own inverse."""
        ...

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's map with another canonical weight and no bias."""
        ...

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        """Views a vector over out channels so that it multiplies the module's output."""
        ...


class Composite(ABC):
    """A ``LayerKind`` of modules that compute with several weights, some of layers inside them that they never call.

    Each of the weights gets an adapter: the module's own parameter one at the path of the module, those of the
    layers one at theirs. A method names the class of such adapters (``OwnKinds.classes``).
    """

    parameter: ClassVar[str]
    """The module's own parameter that is adapted."""
    layers: ClassVar[tuple[str, ...]]
    """Names of the layers inside it whose weights it reads."""
    private: ClassVar[tuple[str, ...]] = ()
    """Private attributes of such a module that modules around it read."""

    @abstractmethod
    def refusal(self, module: nn.Module) -> str:
        """Why a module of the kind cannot be adapted, as part of a sentence; else empty."""


class BaseLayer:
    """What an adapter may see of the layer it sits on.

    Attributes:
        module: the frozen layer itself.
        kind: what kind of layer it is.
        backend: how its weight is stored.
        context: in a forward, what the adapter's method prepared for this call of the model; else None.
        adapters: name -> adapter of what is on the layer; empty where it is seen by itself.
    """

    __slots__ = ("adapters", "backend", "context", "kind", "module")

    def __init__(
        self,
        module: nn.Module,
        kind: LayerKind,
        backend: Backend,
        context: Any = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = module
        self.kind = kind
        self.backend = backend
        self.context = context
        self.adapters: Mapping[str, Any] = {} if adapters is None else adapters

    def within(self, context: Any) -> BaseLayer:
        """The same layer in a call with a context."""
        return BaseLayer(self.module, self.kind, self.backend, context, self.adapters)

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.kind.features(self.module)[0]

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.kind.features(self.module)[1]

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, (out,), or None."""
        with onloaded(self.module):
            bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def device(self) -> torch.device:
        """Where the layer computes: where its weight lies, or is brought to for each call."""
        hook = offloading(self.module)
        return self.backend.device(self.module) if hook is None else torch.device(hook.execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the weight stands for."""
        return self.backend.dtype(self.module)

    def weight(self) -> Tensor:
        """The frozen weight, dequantized, canonical (out, in, …), detached."""
        with onloaded(self.module):
            weight = self.backend.dequantize(self.module)
        return self.kind.canonical(self.module, weight)


def offloading(module: nn.Module) -> Any:
    """The hook by which accelerate keeps a layer's tensors elsewhere between calls, or None.

    Between calls they are on the meta device; what the layer has of its own beside them stays where it is.
    """
    hook = module.__dict__.get("_hf_hook")
    return hook if getattr(hook, "offload", False) else None


def onloaded(module: nn.Module) -> AbstractContextManager[None]:
    """Context manager: loads an offloaded layer's tensors where it computes. Writes to them are discarded."""
    hook = offloading(module)
    return _NOTHING if hook is None else _brought(module, hook)


_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def _brought(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
