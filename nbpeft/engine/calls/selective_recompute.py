"""Recomputes activations and norms of any model in backward instead of storing them.

    with selective_recompute(model):
        loss = model(**batch).loss
        loss.backward()

Inside the block these modules have another ``forward``. A norm and the activation of an MLP save only their input for
backward, and so do the adapters that read their output. The activation of a gated MLP, ``down(act(gate) * up)``, is
deferred until the product and saves only ``gate`` and ``up``. Gated MLPs are recognized by what their code computes and
not by names, and every layer is still called by the model's own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.engine.contract.base import LayerKind
from nbpeft.engine.contract.registry import resolve_layer_kind
from nbpeft.engine.kernels.grouped_heads import grouped_heads
from nbpeft.engine.kernels.numerics import composes
from nbpeft.engine.kernels.recomputed import recompute
from nbpeft.engine.tree.model_tree import frozen_module, walk

_FORWARD, _TRAIN = "forward", "train"
_ACTIVATION_HOMES = ("transformers.activations", "torch.nn.modules.activation")
_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
_ACTIVATION_NAMES = re.compile(r"gelu|silu|swish|mish", re.IGNORECASE)


class selective_recompute:
    """Context manager in which a model's activations and norms are recomputed in backward instead of stored.

    Outputs are equal bit by bit, and gradients up to the order of sums, because the modules' own code runs again.
    Without gradients (``torch.no_grad()``, ``generate``) and in compiled code the modules compute as usual. Modules
    that train, have hooks, buffers or a ``forward`` set by other code, or return different outputs for the same input
    (tested on the first batch) are skipped. The inputs of LoRA adapters on linear layers are not stored either; on a
    CPU, neither are keys and values that are repeated for each query head (``grouped_heads``). If layers are
    checkpointed, backward has to run before the block ends.

    Args:
        model: the model, with or without adapters.
        verify: compare outputs with those of a second call; turn it off for tensors without data (meta, fake).

    Example:
        with nbpeft.selective_recompute(model):
            loss = model(**batch).loss
            loss.backward()
    """

    def __init__(self, model: nn.Module, *, verify: bool = True) -> None:
        self._model = model
        self._verify = verify
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        try:
            with DeferredInterrupts():
                if self._verify:
                    self._opened.enter_context(grouped_heads(self._model))
                for module, forward in _replacements(self._model, self._verify):
                    self._forwards[module] = module.__dict__[_FORWARD] = forward
                for module in self._model.modules() if self._forwards else ():
                    if getattr(module, "use_kernels", False):
                        module.__dict__[_TRAIN] = _Train(module, self._forwards)
                        self._opened.callback(module.__dict__.pop, _TRAIN, None)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        with DeferredInterrupts(to_the_end=True), self._opened:
            while self._forwards:
                module, forward = self._forwards.popitem()
                if module.__dict__.get(_FORWARD) is forward:
                    del module.__dict__[_FORWARD]


class _Train:
    """``train`` of a transformers model that uses ``kernels``: it also sets deleted ``forward``s again.

    When such a model changes between training and evaluation, ``kernels`` chooses a kernel for each of its norms and
    activations; where it has none, as on a CPU, it deletes the module's own ``forward``.
    """

    def __init__(self, model: nn.Module, forwards: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self._train, self._forwards = model.train, forwards

    def __call__(self, mode: bool = True) -> nn.Module:
        model = self._train(mode)
        for module, forward in self._forwards.items():
            module.__dict__.setdefault(_FORWARD, forward)
        return model


def _replacements(model: nn.Module, verify: bool) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yields the modules to change, each once, and their new ``forward``."""
    parents: dict[nn.Module, list[nn.Module]] = {}
    for site in walk(frozen_module(model)):
        if _is_free(site.module) and (_is_norm(site.module) or _is_activation(site.module)):
            parents.setdefault(site.module, []).append(site.parent)
    for module, places in parents.items():
        if _is_activation(module) and all(_is_gating(module, parent, verify) for parent in places):
            yield module, _GatingForward(module, _is_pointwise(module, verify))
        elif _is_norm(module):
            yield module, _RecomputedForward(module, verify)
        elif _keeps_input(module):
            yield module, _RecomputedForward(module, verify, _is_pointwise(module, verify))


def _is_free(module: nn.Module) -> bool:
    """Whether a module is a leaf without trained state or hooks, and with the ``forward`` of its class."""
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (module._modules or module._buffers or watched or _FORWARD in module.__dict__)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and all(p.ndim <= 1 for p in module.parameters())


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    known = home in _ACTIVATION_HOMES or _ACTIVATION_NAMES.search(type(module).__name__) is not None
    in_place = getattr(module, "inplace", False)  # it would overwrite the input that is saved
    return known and not module._parameters and not in_place


def _keeps_input(activation: nn.Module) -> bool:
    """Whether an activation saves a tensor other than its output for backward, so that recomputing saves memory."""
    storages: list[Any] = []
    with torch.enable_grad():
        x = torch.ones(2, 2, device="cpu", requires_grad=True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.append(_storage(t)), lambda _: x):
                output = activation(x)
        except Exception:  # it takes something else
            return False
    return any(storage != _storage(output) for storage in storages)


def _is_pointwise(activation: nn.Module, verify: bool) -> bool:
    """Whether an activation is elementwise, so that a slice of the input gives that slice of the output."""
    if not verify:
        return True
    with torch.no_grad():
        x = torch.linspace(-2.0, 2.0, 12, device="cpu").view(3, 4)
        try:
            part, whole = activation(x[1:2, 1:3]), activation(x)
        except Exception:  # it takes something else
            return False
    return whole.shape == x.shape and torch.allclose(part, whole[1:2, 1:3])


def _storage(tensor: Tensor) -> Any:
    # Not ``data_ptr()``, which is 0 for every tensor without data.
    return tensor.untyped_storage()._cdata


def _is_gating(activation: nn.Module, mlp: nn.Module, verify: bool) -> bool:
    """Whether an MLP only multiplies the output of its activation by another tensor.

    This is tested by running the MLP's own code on a few random numbers, with linear layers that return random outputs:
    with a deferred activation, the inputs of the linear layers have to be equal, bit by bit.
    """
    others = [frozen_module(child) for child in mlp._modules.values() if child not in (activation, None)]
    if not all(isinstance(child, nn.Dropout) or _linear_kind(child) for child in others):
        return False
    waiting: list[_Activated] = []

    def activated(x: Tensor) -> Any:
        waiting.append(_Activated(activation, x))
        return waiting[-1]

    try:
        with torch.no_grad(), torch.device("cpu"):
            inputs, expected = _Trial(mlp, activation, activated).run(), _Trial(mlp, activation, activation).run()
    except Exception:
        return False
    if verify and not (len(expected) == len(inputs) and all(map(_are_equal, expected, inputs))):
        return False
    return bool(waiting) and all(each.is_multiplied and each.tensor is None for each in waiting)


def _are_equal(first: Any, second: Any) -> bool:
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)


def _linear_kind(module: nn.Module) -> LayerKind | None:
    kind = resolve_layer_kind(module)
    return kind if kind is not None and kind.is_linear else None


class _Trial:
    """Replaces an MLP as ``self`` while its ``forward`` runs: another activation, no dropout, no weights.

    Args:
        mlp: the MLP whose ``forward`` runs.
        activation: the MLP's activation.
        instead: the function that is called instead of the activation.
    """

    def __init__(self, mlp: nn.Module, activation: nn.Module, instead: Callable[[Tensor], Any]) -> None:
        self._mlp, self._activation, self._instead = mlp, activation, instead
        self._generator = torch.Generator().manual_seed(0)
        self._given: list[Any] = []

    def run(self) -> list[Any]:
        """Runs ``forward`` and returns the inputs of the linear layers, in the order of calls."""
        first = next(layer for layer in map(frozen_module, self._mlp.children()) if _linear_kind(layer))
        type(self._mlp).forward(self, self._random(first, output=False))
        return self._given

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._mlp, name)
        if value is self._activation:
            return self._instead
        if isinstance(value, nn.Dropout):
            return nn.Identity()
        layer = frozen_module(value) if isinstance(value, nn.Module) else None
        return value if layer is None else _TrialLayer(layer, self._call)

    def _call(self, layer: nn.Module, x: Any) -> Tensor:
        self._given.append(x)
        return self._random(layer, output=True)

    def _random(self, layer: nn.Module, *, output: bool) -> Tensor:
        kind = _linear_kind(layer)
        assert kind is not None
        return torch.randn(1, 2, kind.features(layer)[output], generator=self._generator)


class _TrialLayer:
    """Replaces a linear layer in a trial, with the layer's attributes."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        self._layer, self._call = layer, call

    def __call__(self, x: Any) -> Tensor:
        return self._call(self._layer, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _RecomputedForward:
    """A ``forward`` that saves only the module's input for backward."""

    def __init__(self, module: nn.Module, verify: bool, pointwise: bool = False) -> None:
        self._module, self._pointwise = module, pointwise
        self._forward, self._verify = module.forward, verify
        self._repeats: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or self._repeats is False or not _needs_gradient(args[0]):
            return self._forward(*args, **kwargs)
        if any(parameter.requires_grad for parameter in self._module._parameters.values() if parameter is not None):
            return self._forward(*args)
        output = recompute(self._forward, args[0], pointwise=self._pointwise)
        if self._repeats is None:
            with torch.no_grad():
                again = self._forward(args[0])
            self._repeats = not self._verify or torch.equal(output, again)
        return output if self._repeats else self._forward(*args)


class _GatingForward:
    """The ``forward`` of a gated MLP's activation, which is deferred until the output is multiplied."""

    def __init__(self, module: nn.Module, pointwise: bool) -> None:
        self._forward, self._pointwise = module.forward, pointwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _needs_gradient(args[0]):
            return self._forward(*args, **kwargs)
        return _Activated(self._forward, args[0], self._pointwise)


def _needs_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() and not composes()


class _Activated:
    """``act(gate)``, not yet computed; any operation other than a multiplication computes it as a tensor."""

    def __init__(self, act: Callable[[Tensor], Tensor], gate: Tensor, pointwise: bool = False) -> None:
        self._act, self._gate, self._pointwise = act, gate, pointwise
        self.tensor: Tensor | None = None
        self.is_multiplied = False

    def __mul__(self, up: Any) -> Tensor:
        if not isinstance(up, Tensor) or self.tensor is not None:
            return self._value() * up
        self.is_multiplied = True
        return recompute(partial(_gated, self._act), self._gate, up, pointwise=self._pointwise)

    __rmul__ = __mul__

    def _value(self) -> Tensor:
        if self.tensor is None:
            self.tensor = recompute(self._act, self._gate, pointwise=self._pointwise)
        return self.tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            return args[0] * args[1] if isinstance(args[0], cls) else args[1] * args[0]
        return func(*map(_as_tensor, args), **{name: _as_tensor(value) for name, value in (kwargs or {}).items()})


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """``act(gate) * up``, as a function without references to tensors: they would live as long as the graph."""
    return act(gate) * up


def _as_tensor(value: Any) -> Any:
    return value._value() if isinstance(value, _Activated) else value
