"""The interfaces of a kind of layer and of a weight backend, and the layer as an adapter sees it.

LayerKind   one kind of layer that can be adapted (Linear, Conv1D, Embedding, …)
Composite   a kind whose modules compute with several weights themselves (MultiheadAttention)
Backend     one way to store a weight (dense, bitsandbytes 4-bit, …)
BaseLayer   the frozen layer as an adapter sees it: its module, kind and backend
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""Name of a tensor -> its shape."""


class Backend(Protocol):
    """One way to store a weight. Stateless; one instance serves all modules.

    ``matches`` is called for every module of every model, so it must not import the optional library of the backend:
    look it up in ``sys.modules``.
    """

    name: str
    peft_name: str
    """PEFT's name of an adapted layer with such a weight, ``Linear4bit``; empty to use that of the layer kind."""
    can_merge: bool
    unmergeable_reason: str
    """Why ``can_merge`` is False, for the error message; empty otherwise."""

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
            Whether ``release`` must be called after the last adapter is removed.
        """
        ...

    def release(self, module: nn.Module) -> None:
        """Undoes ``prepare``, where that returned True."""
        ...

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """All tensors that the weight is stored in, including its quantization constants."""
        ...

    def label(self, module: nn.Module) -> str:
        """The storage format as shown to users: ``bf16``, ``nf4``, ``int8``."""
        ...

    def device(self, module: nn.Module) -> torch.device:
        """The device of the weight."""
        ...

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The floating-point dtype of the dequantized weight."""
        ...

    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight as a floating-point tensor in the module's own orientation, detached.

        Must be right at any time, also after a forward pass has repacked the storage. A dense backend
        returns the stored tensor itself, so that writing to it in place changes the module.
        """
        ...

    def store(self, module: nn.Module, weight: Tensor) -> None:
        """Stores a new weight in the module, quantized in the same format as before.

        Args:
            module: the layer.
            weight: floating-point, in the module's own orientation.
        """
        ...

    def snapshot(self, module: nn.Module) -> Any:
        """A copy of everything that ``store`` changes, not on the accelerator."""
        ...

    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Restores a snapshot, bit for bit."""
        ...

    def byte_count(self, module: nn.Module) -> int:
        """Bytes of the stored weight, including its quantization constants."""
        ...


class LayerKind(Protocol):
    """One kind of layer that can be adapted. Stateless.

    The canonical weight is (out, in) or (out, in / groups, *kernel). Every method's maths is
    written for it, whatever orientation the module stores.
    """

    name: str
    peft_name: str
    """PEFT's name of an adapted layer of this kind: ``Linear``, ``Embedding``, ``Conv2d``."""
    is_linear: bool
    """Whether the layer is a matrix product over the last dimension of the input."""
    takes_ids: bool
    """Whether its input is ids (int64), which select columns of the canonical weight, instead of features."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this kind, quantized versions included."""
        ...

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in, out) features."""
        ...

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        """Shape of the canonical weight."""
        ...

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Views a weight in the module's orientation as the canonical weight, or the other way round.

        Args:
            module: the layer.
            weight: in either orientation: the conversion is its own inverse.

        Returns:
            A view.
        """
        ...

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Computes the output of the layer with another weight and without a bias.

        Args:
            module: the layer; gives stride, padding and the like.
            x: the layer's input.
            weight: a canonical weight.

        Returns:
            The output, (…, out), or (batch, out, …) for a convolution.
        """
        ...

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        """Views a vector, (out,), so that it broadcasts over the channels of the module's output."""
        ...


class Composite(ABC):
    """A ``LayerKind`` of modules that compute with several weights, such as ``nn.MultiheadAttention``.

    Some of the weights belong to layers inside the module that it never calls. Each weight gets an adapter of its own:
    the module's own parameter at the path of the module, and the weight of an inner layer at that layer's path. A
    method names the class of such adapters in ``OwnKinds.classes``.
    """

    parameter: ClassVar[str]
    """The module's own parameter that is adapted."""
    layers: ClassVar[tuple[str, ...]]
    """Names of the inner layers whose weights it reads."""
    private: ClassVar[tuple[str, ...]] = ()
    """Private attributes of such a module that the modules around it read."""

    @abstractmethod
    def refusal(self, module: nn.Module) -> str:
        """Why a module of this kind cannot be adapted, as part of a sentence; empty if it can be."""


class BaseLayer:
    """The frozen layer as an adapter sees it.

    Attributes:
        module: the frozen layer.
        kind: its kind.
        backend: how its weight is stored.
        context: during a forward pass, what ``CallInputs.context`` of the method returned for this call; else None.
        adapters: name -> adapter on the layer; empty for a ``BaseLayer`` that was made without them.
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
        """A ``BaseLayer`` of the same layer with another context."""
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
        """The bias of the frozen layer, (out,), or None."""
        with onloaded(self.module):
            bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def device(self) -> torch.device:
        """The device on which the layer computes: for an offloaded weight the one that it is loaded to."""
        hook = offloading(self.module)
        return self.backend.device(self.module) if hook is None else torch.device(hook.execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the dequantized weight."""
        return self.backend.dtype(self.module)

    def weight(self) -> Tensor:
        """The frozen weight, dequantized, in canonical orientation (out, in, …), detached."""
        with onloaded(self.module):
            weight = self.backend.dequantize(self.module)
        return self.kind.canonical(self.module, weight)


def offloading(module: nn.Module) -> Any:
    """accelerate's hook that offloads a layer's tensors between calls, or None.

    Between calls the tensors are on the meta device. Submodules that were added to the layer are not offloaded.
    """
    hook = module.__dict__.get("_hf_hook")
    return hook if getattr(hook, "offload", False) else None


def onloaded(module: nn.Module) -> AbstractContextManager[None]:
    """Context manager: loads an offloaded layer's tensors to the device of its calls; writes to them are lost."""
    hook = offloading(module)
    return _NOTHING if hook is None else _brought(module, hook)


@contextmanager
def all_onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: ``onloaded`` for each of several modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(onloaded(module))
        yield


_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def _brought(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
