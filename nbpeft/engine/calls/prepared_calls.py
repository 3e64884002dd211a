"""Hooks that compute a context for adapters before each call of a model, and hooks on modules inside it.

While the call runs, the context is in ``ActiveAdapters.context`` under the adapter's name. Like the hooks of
``model_calls`` and every layer, these hooks read which adapters are active.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbpeft.engine.calls.model_calls import LayerHook
from nbpeft.engine.calls.model_properties import parameters_of
from nbpeft.engine.changes.active_state import ActiveAdapters
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.model_adapter import AddsInside, HasSideNetwork
from nbpeft.engine.tree.model_tree import walk
from nbpeft.engine.wrappers.layer import AdaptedLayer


class BeforeCall(LayerHook):
    """A hook that prepares each call of a model; if a model has several hooks of one class, the first acts for all.

    The method of its adapters declares ``context=None`` (``CallInputs``); the computed context replaces it.

    Args:
        layer: an adapted layer with the adapters.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__(layer)
        self.unpinned: dict[int, tuple[int, ActiveAdapters, list[str]]] = {}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of the call; None if no adapter is active. See ``nn.Module.register_forward_pre_hook``."""
        hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook) is type(self)]
        if hooks[0] is not self:
            return None
        active = self.layer.active_state.current()
        found = {name: computer for hook in hooks for name, computer in hook.computing(active).items()}
        if not found:
            return None
        contexts: Any = active.context
        # A call of a ``PeftModel`` has its own dictionary of contexts; a direct call of the base model shares one.
        unpinned = [name for name in found if name not in contexts]
        if unpinned:
            # Autograd numbers the nodes of a thread: backward finds the call by the numbers at its beginning and end.
            begun = torch._C._autograd._get_sequence_nr()
            self.unpinned[threading.get_ident()] = (begun, active, unpinned)
        call: dict[str, Any] = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        self.prepare(module, call, active, found)
        return (), call

    def computing(self, active: ActiveAdapters) -> dict[str, Any]:
        """Adapter name -> the object that computes the context, for the active adapters that need one."""
        raise NotImplementedError

    def prepare(self, module: nn.Module, call: dict[str, Any], active: ActiveAdapters, found: dict[str, Any]) -> None:
        """Computes the contexts, and stores them in ``active.context``.

        Args:
            module: the model.
            call: its arguments by name; may be changed.
            active: the active adapters.
            found: the results of ``computing`` of all hooks of the class.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Clears the contexts of a direct call of the base model, and stores them for checkpointing in backward."""
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
    """A hook that ends a call prepared by ``BeforeCall``, whether the call fails or not."""

    def __init__(self, before: BeforeCall) -> None:
        super().__init__(before.layer)
        self.before = before

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Ends the call."""
        self.before.end()


def put_before_calls(model: nn.Module, hook: BeforeCall, change: Transaction, *others: LayerHook) -> None:
    """Registers a hook on a model, once for each adapted layer.

    Args:
        model: the base model.
        hook: the hook.
        change: records the hooks of the model.
        *others: hooks that run after the call, before ``end``.
    """
    present: list[Any] = [other for other in model._forward_pre_hooks.values() if type(other) is type(hook)]
    if any(other.layer is hook.layer for other in present):
        return
    change.keep(model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs)
    change.keep(model._forward_hooks, model._forward_hooks_with_kwargs, model._forward_hooks_always_called)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    after: tuple[Any, ...] = others
    for other in after:
        model.register_forward_hook(other, with_kwargs=True)
    # Called after a failed call too: an adapter must not see the context of an earlier call.
    model.register_forward_hook(AfterCall(hook), with_kwargs=True, always_call=True)


class PlaceHook(LayerHook):
    """A hook on a module inside the model.

    Args:
        layer: the adapted input embedding, which has the model adapters.
        path: path of the module in the base model.
    """

    def __init__(self, layer: AdaptedLayer, path: str) -> None:
        super().__init__(layer)
        self.path = path


def put_at_places(
    model: nn.Module,
    layer: AdaptedLayer,
    kind: type[AddsInside] | type[HasSideNetwork],
    change: Transaction,
    *,
    after: type[Any],
    before: type[Any] | None = None,
) -> None:
    """Registers hooks on the modules that an embedding's model adapters change; once on each module.

    Args:
        model: the base model.
        layer: its adapted input embedding.
        kind: the class of the adapters.
        change: records the hooks of the modules.
        after: ``PlaceHook`` class of the forward hooks.
        before: ``PlaceHook`` class of the forward pre-hooks, if any.
    """
    adapters: list[Any] = [adapter for adapter in layer.adapters._modules.values() if isinstance(adapter, kind)]
    places = {path for adapter in adapters for path in adapter.places}
    for site in walk(model) if places else ():
        module = site.module
        hooks: Any = module._forward_hooks
        present = any(type(hook) is after and hook.layer is layer for hook in hooks.values())
        if present or site.path not in places:
            continue
        change.keep(hooks, module._forward_hooks_with_kwargs)
        module.register_forward_hook(after(layer, site.path), with_kwargs=True)
        if before is not None:
            change.keep(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            module.register_forward_pre_hook(before(layer, site.path), with_kwargs=True)
