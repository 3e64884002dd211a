"""Quantization-aware training: the layer computes with the weight that merging the adapter would store.

    y = Q(W + Δ) x + b        Q: rounds as merging does

The delta of an adapter is often smaller than half a step of the quantization grid, so that merging rounds it away.
Here the layer computes with the merged and rounded weight, which is stored in addition to the frozen one in the same
number of bits, so that merging later does not change the outputs. Rounding has no useful derivative, so a
straight-through estimator is used: the gradient of the input passes through Q(W + Δ), and those of the adapter are the
gradients of y = (W + Δ) x. Autograd stores as much as for an ordinary adapter.

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
"""(name, scale) of active adapters that are on a layer."""
_MARK = "_nbpeft_quantization_aware"
"""Attribute of a base model whose new adapters are trained quantization-aware."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@runtime_checkable
class Rounds(Protocol):
    """A weight backend that rounds when a weight is merged."""

    def twin(self, module: nn.Module) -> nn.Module:
        """A shallow copy of a layer; storing a weight in it does not change the layer."""
        ...


class Layer(Protocol):
    """The members of an ``AdaptedLayer`` that are used here."""

    base: BaseLayer
    backend: Backend
    kind: LayerKind
    base_layer: nn.Module

    def adapter(self, name: str) -> Adapter: ...

    def write_merged(self, chosen: Chosen, module: nn.Module, bias: Tensor | None) -> None: ...


class FakeQuantLayer:
    """A copy of a layer with the active adapters merged, updated when they or the frozen weight change.

    It takes as many bytes as the frozen weight. It is not part of the module tree, and not copied or saved.
    """

    def __init__(self) -> None:
        # Threads may call the layer at the same time, and one of them updates the copy.
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
        """Computes the output that the layer has after merging, with gradients for the unmerged adapters.

        Args:
            layer: the layer.
            x: its input, (…, in).
            chosen: the active adapters.
            bases: adapter name -> the layer as the adapter sees it in this call.
            args: further positional arguments of the layer.
            kwargs: keyword arguments of the layer.

        Returns:
            The output, (…, out).

        Raises:
            AdapterError: the call is compiled, or traced by a transform of torch.func.
        """
        if composes():
            raise AdapterError(
                f"adapter {chosen[0][0]!r} is quantization-aware and cannot be compiled or traced: merge it first"
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
                output = _StraightThrough.apply(output, added, scale)
        return output

    def _current(self, layer: Layer, chosen: Chosen) -> nn.Module:
        """The copy with exactly these adapters merged; other threads wait while it is updated."""
        adapters = [(layer.adapter(name), scale) for name, scale in chosen]
        base = tuple(map(_identity, layer.backend.tensors(layer.base_layer)))
        with self._lock:
            if self._module is None or self._base != base:
                self._module, self._base, self._made_of = layer.backend.twin(layer.base_layer), base, ()  # type: ignore[attr-defined]
            made_of = tuple((id(adapter), scale, *_identities(adapter)) for adapter, scale in adapters)
            if self._made_of != made_of or self._changed_unseen(adapters):
                # Tensors created in inference mode could not be used in later training.
                with torch.inference_mode(False), torch.no_grad(), without_autocast(layer.base.device.type):
                    layer.write_merged(chosen, self._module, _own_bias(layer, self._module, adapters))
                    self._made_of, self._sums = made_of, _sums(adapters)
            if self._module.training != layer.base_layer.training:
                self._module.train(layer.base_layer.training)
            return self._module

    def _changed_unseen(self, adapters: Iterable[tuple[Adapter, float]]) -> bool:
        """Whether parameters were changed without a new version counter, as by writing to ``parameter.data``."""
        if torch._C._current_graph_task_id() != -1:  # in backward (checkpointing) the values are still those of forward
            return False
        return self._sums is None or not torch.equal(_sums(adapters), self._sums)


def _own_bias(layer: Layer, twin: nn.Module, adapters: Iterable[tuple[Adapter, float]]) -> Tensor | None:
    """A separate bias for the copy if adapters change it; otherwise the copy shares the layer's, which may train."""
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
    """Address and version counter of a tensor, which change when it is replaced or written to."""
    # Reading the version counter of a tensor that was created in inference mode raises an error.
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _sums(adapters: Iterable[tuple[Adapter, float]]) -> Tensor:
    """A checksum of each parameter: the sum of its bits as integers."""
    values = (parameter.detach() for adapter, _ in adapters for parameter in adapter.parameters())
    return torch.stack([value.view(_INTEGERS[value.element_size()]).sum(dtype=torch.int64) for value in values])


class _StraightThrough(torch.autograd.Function):
    """Returns the output, and passes its gradient also to the delta, which the output already includes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, added: Tensor, scale: float) -> Tensor:
        ctx.dtype, ctx.scale = added.dtype, scale
        return output.clone()  # not a view: models change outputs in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_added = gradients[0].to(ctx.dtype)
        return gradients[0], of_added if ctx.scale == 1.0 else of_added * ctx.scale, None


def set_quantization_aware(model: nn.Module, wanted: bool) -> None:
    """Sets whether new adapters of a base model are trained quantization-aware."""
    if wanted:
        model.__dict__[_MARK] = True
    else:
        model.__dict__.pop(_MARK, None)


def is_prepared_quantization_aware(model: nn.Module) -> bool:
    """Whether new adapters of a base model are trained quantization-aware; see ``set_quantization_aware``."""
    return bool(model.__dict__.get(_MARK, False))


def check(layers: Iterable[tuple[str, Layer, Adapter]]) -> None:
    """Checks that adapters can be trained quantization-aware, before they are added to a model.

    Args:
        layers: (path, layer, adapter) of each target.

    Raises:
        ConfigError: no layer is quantized, a layer does not support merging, or a method does more than add a delta
            to weights.
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
            "quantization_aware=True needs quantized layers, and none of the target layers is quantized: remove it",
            field="quantization_aware",
        )


def _reason(layer: Layer, adapter: Adapter) -> str:
    if not layer.backend.can_merge:
        return f"a {layer.backend.name} weight cannot be merged into: {layer.backend.unmergeable_reason}"
    if not isinstance(layer.backend, Rounds):
        return f"the {layer.backend.name} backend does not support it"
    if not layer.kind.is_linear:
        return f"it is a {layer.kind.peft_name}"
    if offloading(layer.base_layer) is not None:
        return "it is offloaded: load the model without offloading"
    if adapter.reads_weight or isinstance(adapter, TransformsInput | TransformsOutput):
        return f"{type(adapter).__name__} does more than add a delta to it"
    refusal = adapter.unmergeable_reason(layer.base)
    return f"its adapter cannot be merged into {refusal}" if refusal else ""


@torch.no_grad()
def _storing_fails(layer: Layer) -> str:
    """Why storing a weight in a layer's format fails, found by trying it on a copy; empty if it works."""
    try:
        twin = layer.backend.twin(layer.base_layer)  # type: ignore[attr-defined]
        layer.backend.store(twin, layer.backend.dequantize(layer.base_layer))
    except MergeError as error:
        return str(error)
    return ""
