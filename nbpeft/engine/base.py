"""What the engine asks of a kind of layer and of a way to store its weight.

Host      one kind of layer that can be adapted (Linear, Conv1D, Embedding, …)
Backend   one way a weight is stored (dense, bitsandbytes 4-bit, …)
Base      what an adapter may see of the layer it sits on: its host and backend, joined
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Backend(Protocol):
    """One way a weight is stored. Stateless; one instance serves all modules.

    ``matches`` must not import the optional library it speaks of: look in ``sys.modules``.
    """

    name: str
    can_merge: bool
    merge_refusal: str
    """Why ``can_merge`` is False, for the error's message; empty otherwise."""

    def matches(self, module: nn.Module) -> bool:
        """Whether this backend reads the module's weight."""
        ...

    def prepare(self, module: nn.Module) -> None:
        """Sees to a module of a model that gets its first adapter. Idempotent."""
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


@dataclass(frozen=True)
class Dropout:
    """Dropout of an adapter's input: a probability and whether it acts now."""

    probability: float
    training: bool

    @property
    def acts(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.probability > 0.0


class Host(Protocol):
    """One kind of layer that can be adapted. Stateless.

    The canonical weight is (out, in) or (out, in / groups, *kernel): every method's maths is
    written for it, whatever the module stores.
    """

    name: str
    factor_names: tuple[str, str]
    """Names of the two low-rank factors, e.g. ``("lora_A", "lora_B")``."""
    zero_factor: int
    """Which factor starts at zero under the usual init: 1 (B), or 0 (A, for lookups)."""
    multiplies: bool
    """Whether its low-rank product is two matrix products of the input's last dimension."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this kind (quantized versions included)."""
        ...

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in, out) features."""
        ...

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A view of a weight in the module's orientation as the canonical one; its own inverse."""
        ...

    def factor_shapes(self, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for a rank.

        Raises:
            ConfigError: this layer cannot take that rank.
        """
        ...

    def low_rank(
        self,
        module: nn.Module,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        dropout: Dropout,
        onto: Tensor | None = None,
    ) -> Tensor:
        """scaling * B(A(dropout(x))), shaped like the module's output, without a bias.

        With ``onto`` it is added to that, in its dtype.
        """
        ...

    def linear(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's map with another canonical weight and no bias."""
        ...

    def product(self, module: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """B A as a canonical weight.

        Raises:
            MergeError: it is none, see ``product_refusal``.
        """
        ...

    def product_refusal(self, module: nn.Module) -> str:
        """Why B A is not a weight of this layer, so that it can neither be merged nor normalised; else empty."""
        ...

    def per_channel(self, module: nn.Module, vector: Tensor) -> Tensor:
        """Views a vector over out channels so that it multiplies the module's output."""
        ...


class Base:
    """What an adapter may see of the layer it sits on.

    Attributes:
        module: the frozen layer itself.
        host: its kind.
        backend: how its weight is stored.
    """

    __slots__ = ("backend", "host", "module")

    def __init__(self, module: nn.Module, host: Host, backend: Backend) -> None:
        self.module = module
        self.host = host
        self.backend = backend

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.host.features(self.module)[0]

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.host.features(self.module)[1]

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
        return self.host.canonical(self.module, weight)


def fits(factor: float, dtype: torch.dtype) -> bool:
    """Whether torch's in-place sums take a factor (``alpha``) on tensors of a dtype: not one beyond its range."""
    return abs(factor) <= torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinite numbers."""
    # A sum is fast and only finite if all that is added is; a large one may overflow by itself.
    tensor = tensor if tensor.element_size() > 1 else tensor.float()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


def add_scaled_(weight: Tensor, delta: Tensor, scale: float) -> None:
    """Adds ``scale * delta`` to a weight of the same shape in place; beyond a dtype's range that is infinite."""
    if fits(scale, weight.dtype):
        weight.add_(delta, alpha=scale)
    else:
        weight.add_(delta * scale)


def offloading(module: nn.Module) -> Any:
    """The hook by which accelerate keeps a layer's tensors elsewhere between calls, or None.

    Between calls they are on the meta device; what the layer has of its own beside them stays where it is.
    """
    hook = module.__dict__.get("_hf_hook")
    return hook if getattr(hook, "offload", False) else None


def onloaded(module: nn.Module) -> AbstractContextManager[None]:
    """Has an offloaded layer's tensors where it computes while the block runs; writing to them is in vain."""
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
