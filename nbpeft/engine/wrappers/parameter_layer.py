"""AdaptedParameter: the wrapper around a module with an adapted bare parameter, such as the experts of a mixture.

If several parameters of a module are adapted, each has a wrapper, and the wrappers are nested. The outermost calls a
shallow copy of the module with these parameters replaced, so that other threads can call the module at the same time
with other adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.active_state import NO_ADAPTERS, ActiveAdapters, ActiveState
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.base import Backend, BaseLayer, LayerKind
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.views.shown_modules import use_shown
from nbpeft.engine.wrappers.factored_weight import AdaptsParameters, FactoredWeight, Product
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.row_order import check_row_order
from nbpeft.errors import AdapterError

_MULTIPLYING = (None, "eager", "grouped_mm", "batched_mm")
"""transformers' ways to compute experts (``_experts_implementation``) that only index and multiply."""


class AdaptedOwner(AdaptedLayer):
    """A module that is not a layer, and the named adapters of one of its parameters.

    Attributes:
        base_layer: the module, or the wrapper for another parameter of it.
        parameter_name: name of the parameter.
    """

    parameter_name: str

    def __init__(self, module: nn.Module, name: str, kind: LayerKind, backend: Backend, state: ActiveState) -> None:
        super().__init__(module, kind, backend, state)
        self.__dict__.update(
            parameter_name=name,
            base=BaseLayer(ParameterView(module, name), kind, backend, adapters=self.adapters._modules),
        )

    @property
    def weight_module(self) -> nn.Module:
        """A module that has the parameter as its ``weight``."""
        return self.base.module

    def with_adapters(self, active: ActiveAdapters) -> FactoredWeight | None:
        """The parameter plus the products of the active adapters; None if there are none or they are merged."""
        return factored_weight(self, self.own_base(), active)

    def own_base(self) -> BaseLayer:
        """``base``, or a new one in a replica of ``nn.DataParallel``, which has another module."""
        module: nn.Module = self.wrapped_module()
        if module is self.weight_module.owner:
            return self.base
        return BaseLayer(
            ParameterView(module, self.parameter_name), self.kind, self.backend, adapters=self.adapters._modules
        )

    def wrapped_module(self) -> nn.Module:
        inner: Any = self
        while isinstance(inner, AdaptedLayer):
            inner = inner._modules["base_layer"]
        return inner


class AdaptedParameter(AdaptedOwner):
    """A module and the named adapters of one of its parameters, which the config names (``target_parameters``)."""

    def path_at(self, place: str) -> str:
        """Path of the parameter, if the module is at path ``place``."""
        return f"{place}.{self.parameter_name}"

    def attach(self, modules: dict[str, nn.Module | None], attribute: str, change: Transaction) -> None:
        """Wraps the module, or its wrappers for other parameters, in its parent."""
        inner = modules[attribute]
        if not any(wrapper is self for wrapper in wrappers_of(inner)):
            self._modules["base_layer"] = inner
            super().attach(modules, attribute, change)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module with the active adapters' deltas on its parameters."""
        layers = tuple(wrappers_of(self))
        if any(layer.has_any_of(layer.active_state.current()) for layer in layers):
            # As a decorator, it would import the compiler with this module.
            adapted = torch.compiler.disable(_adapted) if torch.compiler.is_compiling() else _adapted
            return adapted(layers, args, kwargs)
        return self.wrapped_module()(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = ParameterReplica
        return replica


class ParameterReplica(AdaptedParameter):
    """A replica made by ``nn.DataParallel``; see ``LayerReplica``."""

    def show_adapters(self) -> None:
        """Does nothing: a replica is never changed."""

    def with_adapters(self, active: ActiveAdapters) -> FactoredWeight | None:
        use_shown(self.adapters._modules, self._modules)
        return super().with_adapters(active)


def factored_weight(layer: AdaptedLayer, base: BaseLayer, active: ActiveAdapters) -> FactoredWeight | None:
    """The weight of an adapted module plus the products of active adapters.

    Args:
        layer: the wrapper with the adapters.
        base: the frozen module, as the adapters use it.
        active: the active adapters and their scales.

    Returns:
        The sum; None if no adapter is active or they are merged.
    """
    products: list[Product] = []
    for name, scale in zip(active.names, active.scales, strict=True):
        adapter: Any = layer.adapters._modules.get(name)
        if isinstance(adapter, AdaptsParameters) and not layer.merged_names:
            added = adapter.parameter_products(base)
            products += [product._replace(scale=product.scale * scale) for product in added]
    weight: Any = base.module.weight
    return FactoredWeight(weight, products) if products else None


def wrappers_of(module: nn.Module | None) -> Iterator[AdaptedParameter]:
    """The wrappers for parameters around a module, the outermost first."""
    while isinstance(module, AdaptedParameter):
        yield module
        module = module._modules["base_layer"]


def only_multiplies(module: nn.Module) -> bool:
    """Whether a module is known to use its parameters only in indexing and matrix products."""
    source = getattr(type(module).forward, "__module__", "")
    way = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return source.startswith("transformers.models.") and way in _MULTIPLYING


def _adapted(layers: Sequence[AdaptedParameter], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of the module inside some wrappers, with the active adapters of each."""
    active = [layer.active_state.current() for layer in layers]
    rows = next((one.rows for one in active if one.rows is not None), None)
    if rows is None:
        return _called(layers, active, args, kwargs)
    tokens = {len(value) if isinstance(value, Tensor) else -1 for value in args}
    if kwargs or len(args) < 2 or len(tokens) != 1 or max(tokens) % len(rows.index):
        kind, name = type(layers[0].wrapped_module()).__name__, rows.names[0]
        parameters = " and ".join(layer.parameter_name for layer in reversed(layers))
        raise AdapterError(
            f"lora.ParamWrapper does not support mixed adapter batches yet in a {kind:.60}: adapter {name!r} adapts "
            f"its {parameters}, so use a separate batch for each adapter"
        )
    check_row_order(rows, args[0], layers[0])
    parts = []
    for name, run in rows.runs(tokens.pop()):  # inputs of experts are flattened: the tokens of a row are adjacent
        alone = ActiveAdapters((name,), (rows.scales[rows.names.index(name)],)) if name else NO_ADAPTERS
        parts.append(_called(layers, [alone] * len(layers), tuple(value[run] for value in args), {}))
    return torch.cat(parts)


def _called(
    layers: Sequence[AdaptedParameter], active: Sequence[ActiveAdapters], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls the module inside some wrappers with adapted parameters; the module itself is not changed."""
    found = {layer.parameter_name: layer.with_adapters(one) for layer, one in zip(layers, active, strict=True)}
    weights = {name: weight for name, weight in found.items() if weight is not None}
    module = layers[0].wrapped_module()
    if not weights:
        return module(*args, **kwargs)
    if only_multiplies(module):
        return twin_of(module, weights)(*args, **kwargs)
    return twin_of(module, {name: weight.summed() for name, weight in weights.items()})(*args, **kwargs)


def twin_of(module: nn.Module, weights: Mapping[str, Any], modules: Mapping[str, nn.Module] | None = None) -> Any:
    """A shallow copy of a module with some parameters and submodules replaced.

    Args:
        module: the original, which is not changed.
        weights: name of a parameter -> its replacement, a tensor or a ``FactoredWeight``.
        modules: name of a submodule -> its replacement.

    Returns:
        The copy.
    """
    twin = object.__new__(type(module))
    twin.__dict__ = {key: _rebound(value, module, twin) for key, value in module.__dict__.items()}
    parameters = {name: value for name, value in module._parameters.items() if name not in weights}
    twin.__dict__.update(_parameters=parameters, **weights)
    if modules:
        twin.__dict__["_modules"] = {**module._modules, **modules}
    return twin


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """Binds a method of the module, or accelerate's partial of one, to the copy; returns any other value unchanged."""
    if getattr(value, "__self__", None) is module:
        return value.__func__.__get__(twin)
    if isinstance(value, functools.partial) and value.args[:1] == (module,):
        return functools.partial(value.func, twin, *value.args[1:], **value.keywords)
    return value
