"""Hooks on a model that compute something before each of its calls, and hooks on modules inside it, for its adapters.

What is computed is in ``ActiveAdapters.context`` under the name of the adapter while the call runs, whoever makes the
call. As
the hooks of ``model_calls`` they read what is active as every layer does.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbpeft.engine.calls.model_calls import LayerHook, parameters_of
from nbpeft.engine.changes.active_state import ActiveAdapters
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.model_adapter import AddsInside, RunsBeside
from nbpeft.engine.tree.model_tree import walk
from nbpeft.engine.wrappers.layer import AdaptedLayer


class BeforeCall(LayerHook):
    """A hook that prepares each call of a model; of several of a class the first does it for all of them.

    The method of its adapters declares a ``context`` of None (``CallInputs``): what is computed takes that place.

    Args:
        layer: an adapted layer that has the adapters.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__(layer)
        self.unpinned: dict[int, tuple[int, ActiveAdapters, list[str]]] = {}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of the call; None where nothing acts. See ``nn.Module.register_forward_pre_hook``."""
        hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook) is type(self)]
        if hooks[0] is not self:
            return None
        active = self.layer.active_state.current()
        found = {name: one for hook in hooks for name, one in hook.computing(active).items()}
        if not found:
            return None
        contexts: Any = active.context
        # A call of a handle has a place for each context. Who calls the base model itself acts with what is shared.
        unpinned = [name for name in found if name not in contexts]
        if unpinned:
            begun = torch._C._autograd._get_sequence_nr()
            self.unpinned[threading.get_ident()] = (begun, active, unpinned)
        call: dict[str, Any] = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        self.prepare(module, call, active, found)
        return (), call

    def computing(self, active: ActiveAdapters) -> dict[str, Any]:
        """Adapter name -> what computes something, of those active adapters that need it."""
        raise NotImplementedError

    def prepare(self, module: nn.Module, call: dict[str, Any], active: ActiveAdapters, found: dict[str, Any]) -> None:
        """Computes it, and puts it into ``active.context``.

        Args:
            module: the model.
            call: its arguments by name; may be changed.
            active: what acts.
            found: what ``computing`` gave, of all hooks of the class.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Clears what a call has left that no handle made; checkpointing still finds it."""
        begun = self.unpinned.pop(threading.get_ident(), None)
        if begun is None:
            return
        number, active, names = begun
        contexts: Any = active.context
        if torch.is_grad_enabled():
            self.layer.active_state.remember(number, replace(active, context=dict(contexts)))  # type: ignore[union-attr]
        for name in names:
            contexts.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "unpinned": {}}


class AfterCall(LayerHook):
    """A hook that ends what the other one began, whether the call fails or not."""

    def __init__(self, before: BeforeCall) -> None:
        super().__init__(before.layer)
        self.before = before

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Ends the call."""
        self.before.end()


def put_before_calls(model: nn.Module, hook: BeforeCall, change: Transaction, *others: LayerHook) -> None:
    """Puts a hook on a model, once for each adapted layer.

    Args:
        model: the base model.
        hook: the hook.
        change: records the hooks of the model.
        *others: hooks that act after the call, before it ends.
    """
    present: list[Any] = [other for other in model._forward_pre_hooks.values() if type(other) is type(hook)]
    if any(other.layer is hook.layer for other in present):
        return
    change.keep(model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs)
    change.keep(model._forward_hooks, model._forward_hooks_with_kwargs, model._forward_hooks_always_called)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    behind: tuple[Any, ...] = others
    for other in behind:
        model.register_forward_hook(other, with_kwargs=True)
    model.register_forward_hook(AfterCall(hook), with_kwargs=True, always_call=True)


class PlaceHook(LayerHook):
    """A hook on a module inside the model.

    Args:
        layer: the adapted input embedding, where the model adapters hang.
        path: of the module, in the base model.
    """

    def __init__(self, layer: AdaptedLayer, path: str) -> None:
        super().__init__(layer)
        self.path = path


def put_at_places(
    model: nn.Module,
    layer: AdaptedLayer,
    kind: type[AddsInside] | type[RunsBeside],
    change: Transaction,
    *,
    behind: type[Any],
    before: type[Any] | None = None,
) -> None:
    """Puts hooks on the modules at which adapters of an adapted embedding act; once on each module.

    Args:
        model: the base model.
        layer: its input embedding.
        kind: which of its adapters.
        change: records the hooks of the modules.
        behind: class of the hooks behind the modules, a ``PlaceHook``.
        before: class of those in front of them, if any; likewise.
    """
    adapters: list[Any] = [adapter for adapter in layer.adapters._modules.values() if isinstance(adapter, kind)]
    places = {path for adapter in adapters for path in adapter.places}
    for site in walk(model) if places else ():
        module = site.module
        hooks: Any = module._forward_hooks
        present = any(type(hook) is behind and hook.layer is layer for hook in hooks.values())
        if present or site.path not in places:
            continue
        change.keep(hooks, module._forward_hooks_with_kwargs)
        module.register_forward_hook(behind(layer, site.path), with_kwargs=True)
        if before is not None:
            change.keep(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            module.register_forward_pre_hook(before(layer, site.path), with_kwargs=True)
