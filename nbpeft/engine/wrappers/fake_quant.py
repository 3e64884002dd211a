"""Training that knows the grid its result will be rounded to (quantization-aware training).

    y = Q(W + Δ) x + b        Q: rounds as merging does

What an adapter adds to a weight is often less than half a step between two levels of its grid, and merging rounds it
away. Here a layer computes with the weight that a merge would store, kept beside the frozen one in as many bits, so
that merging changes nothing. Rounding has no useful derivative; gradients pass straight through it: the input's
go through Q(W + Δ), and the adapter's are those of y = (W + Δ) x. What backward keeps is what it keeps of an
adapter beside the layer.

References: the straight-through estimator, https://arxiv.org/abs/1308.3432; low-rank adapters inside the rounding,
https://arxiv.org/abs/2406.06385 (LR-QAT).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import Adapter, Rescales, TransformsInput, TransformsOutput
from nbpeft.engine.contract.base import Backend, BaseLayer, LayerKind, offloading
from nbpeft.engine.kernels.numerics import composes, without_autocast
from nbpeft.engine.kernels.recomputed import detached
from nbpeft.errors import AdapterError, ConfigError, MergeError

Chosen = Sequence[tuple[str, float]]
"""Names of adapters that are on a layer, and the factor on what each adds."""
_ASKED = "_nbpeft_quantization_aware"
"""Attribute of a base model whose new adapters act on rounded weights."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@runtime_checkable
class Rounds(Protocol):
    """A way to store a weight that rounds what is merged into it."""

    def twin(self, module: nn.Module) -> nn.Module:
        """A second layer like a module: what is stored into it does not change the first."""
        ...


class Layer(Protocol):
    """What is needed of an adapted layer."""

    base: BaseLayer
    backend: Backend
    kind: LayerKind
    base_layer: nn.Module

    def adapter(self, name: str) -> Adapter: ...  # noqa: D102

    def write_merged(self, chosen: Chosen, module: nn.Module, bias: Tensor | None) -> None: ...  # noqa: D102


class FakeQuantLayer:
    """A layer's twin with the adapters that act merged in, made again when they, or the frozen weight, have changed.

    It takes as many bytes as the frozen weight, is no part of the model's tree, and no file or copy has it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._module: nn.Module | None = None
        self._base: tuple[Any, ...] = ()
        self._made_of: tuple[Any, ...] = ()
        self._sums: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeQuantLayer:
        return FakeQuantLayer()

    def __reduce__(self) -> tuple[type[FakeQuantLayer], tuple[()]]:
        return FakeQuantLayer, ()

    def output(
        self,
        layer: Layer,
        x: Tensor,
        chosen: Chosen,
        bases: Mapping[str, BaseLayer],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """What the layer gives once these adapters are merged; gradients reach them as if they acted beside it.

        Args:
            layer: the layer.
            x: its input, (…, in).
            chosen: what acts on it.
            bases: adapter -> the layer as it sees it in this call.
            args: further positional arguments of the layer.
            kwargs: keyword arguments of the layer.

        Raises:
            AdapterError: a compiler or a transform of torch.func traces the call.
        """
        if composes():
            raise AdapterError(
                f"adapter {chosen[0][0]!r} acts on rounded weights, which cannot be compiled or traced: merge it first"
            )
        module = self._current(layer, chosen)
        device = layer.base.device
        output: Tensor = module(x if x.device == device else x.to(device), *args, **(kwargs or {}))
        if not torch.is_grad_enabled():
            return output
        inputs = detached(x)
        for name, scale in chosen:
            adapter = layer.adapter(name)
            if any(parameter.requires_grad for parameter in adapter.parameters()):
                added = adapter(inputs, output.detach(), bases[name])
                output = _StraightThrough.apply(output, added, scale)  # type: ignore[no-untyped-call]
        return output

    def _current(self, layer: Layer, chosen: Chosen) -> nn.Module:
        """The twin with just these adapters merged in."""
        adapters = [(layer.adapter(name), scale) for name, scale in chosen]
        base = tuple(map(_identity, layer.backend.tensors(layer.base_layer)))
        with self._lock:
            if self._module is None or self._base != base:
                self._module, self._base, self._made_of = layer.backend.twin(layer.base_layer), base, ()  # type: ignore[attr-defined]
            made_of = tuple((id(adapter), scale, *_identities(adapter)) for adapter, scale in adapters)
            if self._made_of != made_of or self._changed_unseen(adapters):
                with torch.inference_mode(False), torch.no_grad(), without_autocast(layer.base.device.type):
                    layer.write_merged(chosen, self._module, _own_bias(layer, self._module, adapters))
                    self._made_of, self._sums = made_of, _sums(adapters)
            if self._module.training != layer.base_layer.training:
                self._module.train(layer.base_layer.training)
            return self._module

    def _changed_unseen(self, adapters: Iterable[tuple[Adapter, float]]) -> bool:
        """Whether numbers were changed where torch does not count it, as through ``parameter.data``."""
        if torch._C._current_graph_task_id() != -1:  # what checkpointing computes again is as it was
            return False
        return self._sums is None or not torch.equal(_sums(adapters), self._sums)


def _own_bias(layer: Layer, twin: nn.Module, adapters: Iterable[tuple[Adapter, float]]) -> Tensor | None:
    """A bias of the twin's own where adapters add to it; else it has the layer's, which may be trained."""
    bias = layer.base.bias
    if bias is None or all(adapter.delta_bias(layer.base) is None for adapter, _ in adapters):
        return None
    own = twin._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return own


def _identities(adapter: Adapter) -> Iterable[Any]:
    if isinstance(adapter, Rescales):
        yield float(adapter.scaling)
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        yield _identity(tensor)


def _identity(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor does: where its numbers are, and how often torch has seen them change."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _sums(adapters: Iterable[tuple[Adapter, float]]) -> Tensor:
    """A sum over the bits of each parameter: another one after nearly every change."""
    held = (parameter.detach() for adapter, _ in adapters for parameter in adapter.parameters())
    return torch.stack([one.view(_INTEGERS[one.element_size()]).sum(dtype=torch.int64) for one in held])


class _StraightThrough(torch.autograd.Function):
    """An output, whose gradient goes also to what is a part of it already."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, added: Tensor, scale: float) -> Tensor:
        ctx.dtype, ctx.scale = added.dtype, scale
        return output.clone()  # not a view: models change outputs in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_added = gradients[0].to(ctx.dtype)
        return gradients[0], of_added if ctx.scale == 1.0 else of_added * ctx.scale, None


def set_quantization_aware(model: nn.Module, wanted: bool) -> None:
    """Sets whether new adapters of a base model act on rounded weights."""
    if wanted:
        model.__dict__[_ASKED] = True
    else:
        model.__dict__.pop(_ASKED, None)


def is_prepared_quantization_aware(model: nn.Module) -> bool:
    """Whether ``set_quantization_aware`` was told so."""
    return bool(model.__dict__.get(_ASKED, False))


def check(layers: Iterable[tuple[str, Layer, Adapter]]) -> None:
    """Refuses adapters that cannot act on rounded weights, before they are put on a model.

    Args:
        layers: path, layer and adapter of each.

    Raises:
        ConfigError: no weight would be rounded when merging, one cannot be merged into, or a method does more than to
            add to weights.
    """
    tried: set[str] = set()
    for path, layer, adapter in layers:
        backend = layer.backend
        if backend.name == "dense":
            continue
        reason = _reason(layer, adapter)
        if not reason and backend.name not in tried:
            tried.add(backend.name)
            reason = _storing_fails(layer)
        if reason:
            raise ConfigError(
                f"{path}: quantization_aware=True needs a weight that merging can round, and {reason}",
                field="quantization_aware",
            )
    if not tried:
        raise ConfigError(
            "quantization_aware=True is for adapters on quantized layers, and none of these layers is quantized: leave "
            "it out",
            field="quantization_aware",
        )


def _reason(layer: Layer, adapter: Adapter) -> str:
    if not layer.backend.can_merge:
        return f"a {layer.backend.name} weight cannot be merged into: {layer.backend.unmergeable_reason}"
    if not isinstance(layer.backend, Rounds):
        return f"a {layer.backend.name} weight has no twin"
    if not layer.kind.is_linear:
        return f"it is a {layer.kind.peft_name}"
    if offloading(layer.base_layer) is not None:
        return "it is offloaded: load the model without offloading"
    if adapter.reads_weight or isinstance(adapter, TransformsInput | TransformsOutput):
        return f"{type(adapter).__name__} does more than to add to it"
    refusal = adapter.unmergeable_reason(layer.base)
    return f"its adapter cannot be merged into {refusal}" if refusal else ""


@torch.no_grad()
def _storing_fails(layer: Layer) -> str:
    """Why a weight cannot be stored as that of a layer is, by trying it on its twin; else empty."""
    try:
        twin = layer.backend.twin(layer.base_layer)  # type: ignore[attr-defined]
        layer.backend.store(twin, layer.backend.dequantize(layer.base_layer))
    except MergeError as error:
        return str(error)
    return ""
