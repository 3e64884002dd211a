"""Lets an adapter see what a model makes of an input before the call in which it acts.

A hook on the model runs each of its calls twice, whoever makes it: first without gradient, for the hidden states of the
last layer, then as it was asked for. What the adapters of the layers find in ``base.context`` is in the first pass what
their method says and in the second what it makes of the hidden states. As the hooks of ``model_calls`` it reads what is
active as every layer does. A cache of keys and values has a second one for the first pass (``two_pass_cache``).
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.active_state import Active
from nbpeft.engine.layer import AdaptedLayer
from nbpeft.engine.model_calls import LayerHook, cache_argument, parameters_of
from nbpeft.engine.transaction import Transaction
from nbpeft.errors import AdapterError

_ONLY_FOR_HEADS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")


class NeedsFirstPass(ABC):
    """Computes what its adapters do in a call from what the model makes of the input; a ``SharedState``.

    Its method declares ``call_context``, which gives None: what is found takes that place while the call runs.
    """

    @property
    @abstractmethod
    def first_context(self) -> Any:
        """What its adapters find in ``base.context`` in the first pass."""

    @abstractmethod
    def context(self, hidden: Tensor) -> Any:
        """What they find there in the call itself.

        Args:
            hidden: (rows, length, features), the last hidden states of the first pass, without gradient.
        """


class _FirstPass(LayerHook):
    """A hook that makes the first pass before each call of a model.

    Args:
        layer: the first adapted layer, whose adapters have what their layers share.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__(layer)
        self.unpinned: dict[int, tuple[int, Active, list[str]]] = {}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _FirstPass)]
        if hooks[0] is not self:  # one pass is for all of them
            return None
        active = self.layer.active_state.current()
        states = {name: state for hook in hooks for name, state in hook.states(active).items()}
        if not states:
            return None
        contexts: Any = active.context
        # A call of a handle has a place for each context. Who calls the base model itself acts with what is shared.
        unpinned = [name for name in states if name not in contexts]
        if unpinned:
            begun = torch._C._autograd._get_sequence_nr()
            self.unpinned[threading.get_ident()] = (begun, active, unpinned)
        call: dict[str, Any] = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        first = _first_call(module, call)
        contexts.update({name: state.first_context for name, state in states.items()})
        hidden = _last_hidden_states(module, first)
        contexts.update({name: state.context(hidden) for name, state in states.items()})
        return (), call

    def states(self, active: Active) -> dict[str, NeedsFirstPass]:
        """Adapter name -> what its layers share, of those active adapters that need the pass."""
        names = active.names if active.rows is None else active.rows.names
        found: dict[str, NeedsFirstPass] = {}
        for name in names:
            adapter = self.layer.adapters._modules.get(name)
            state: Any = None if adapter is None else adapter._modules.get("shared")
            if isinstance(state, NeedsFirstPass):
                found[name] = state
        return found

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


class _AfterCall(LayerHook):
    """A hook that ends what the other one began, whether the call fails or not."""

    def __init__(self, first: _FirstPass) -> None:
        super().__init__(first.layer)
        self.first = first

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.first.end()


def put_first_pass(model: nn.Module, layer: AdaptedLayer, change: Transaction) -> None:
    """Lets the adapters of a model that need it have a first pass before each call; once for each first layer.

    Args:
        model: the base model.
        layer: the first adapted layer.
        change: records the hooks of the model.
    """
    present = (hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _FirstPass))
    if any(hook.layer is layer for hook in present):
        return
    change.keep(model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs)
    change.keep(model._forward_hooks, model._forward_hooks_with_kwargs, model._forward_hooks_always_called)
    first = _FirstPass(layer)
    model.register_forward_pre_hook(first, with_kwargs=True)
    model.register_forward_hook(_AfterCall(first), with_kwargs=True, always_call=True)


@torch.no_grad()
def _last_hidden_states(module: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """Makes the first pass, with the backbone of a model alone where it has one.

    Raises:
        AdapterError: the model gives no hidden states.
    """
    backbone = getattr(module, str(getattr(module, "base_model_prefix", "")) or "", None)
    if isinstance(backbone, nn.Module):
        known = inspect.signature(backbone.forward).parameters
        takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
        output: Any = backbone(**{name: value for name, value in call.items() if takes_all or name in known})
    else:  # its hooks, this one among them, are for the call itself
        output = module.forward(**call, output_hidden_states=True)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        hidden = (getattr(output, "hidden_states", None) or (None,))[-1]
    if not isinstance(hidden, Tensor):
        raise AdapterError(f"{type(module).__name__} gives no hidden states, which the active adapter needs")
    return hidden


def _first_call(module: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the first pass; a cache that the call itself is to fill is put among its own.

    Raises:
        AdapterError: the call goes on with a cache that the first pass has not seen.
    """
    first = {name: value for name, value in call.items() if name not in _ONLY_FOR_HEADS}
    if hasattr(module, "config"):
        first["return_dict"] = True
    name = cache_argument(module)
    if not name:
        return first
    first.pop("past_key_values", None)
    former = call.pop("past_key_values", None)
    given = call.get(name) if former is None else former
    if given is None and not _fills_cache(module, call):
        return first | {"use_cache": False}
    from nbpeft.engine.two_pass_cache import with_first_pass

    call[name] = with_first_pass(given, module)
    return first | {name: call[name].first_pass, "use_cache": True}


def _fills_cache(module: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether a call without a cache begins one; what is learned from needs none, where nobody asks for it."""
    asked = call.get("use_cache")
    if asked is None:
        asked = not torch.is_grad_enabled() and getattr(getattr(module, "config", None), "use_cache", False)
    return bool(asked)
