"""Runs a model once before each call, for adapters that read its hidden states.

A hook on the model runs each call twice, whatever code makes it: first without gradient, for the hidden states of the
last layer, then the call itself. In the first pass ``base.context`` of the layers is ``first_context``; in the second
it is what ``context`` computes from the hidden states. Like the hooks of ``model_calls`` and every layer, the hook
reads which adapters are active. The call's cache of keys and values contains a second cache for the first pass
(``two_pass_cache``).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_properties import cache_argument, fills_cache, take_cache
from nbpeft.engine.calls.prepared_calls import BeforeCall, put_before_calls
from nbpeft.engine.changes.active_state import ActiveAdapters
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError

_ONLY_FOR_HEADS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep")


class NeedsFirstPass(ABC):
    """A ``SharedState`` that computes its adapters' context from the hidden states of a first pass.

    Its method declares ``context=None`` (``CallInputs``); the computed context replaces it during the call.
    """

    @property
    @abstractmethod
    def first_context(self) -> Any:
        """``base.context`` of its adapters in the first pass."""

    @abstractmethod
    def context(self, hidden: Tensor) -> Any:
        """``base.context`` of its adapters in the call itself.

        Args:
            hidden: (rows, length, features), the last hidden states of the first pass, without gradient.
        """


class _FirstPass(BeforeCall):
    """A hook that makes the first pass before each call of a model; it belongs to the first layer of an adapter."""

    def computing(self, active: ActiveAdapters) -> dict[str, NeedsFirstPass]:
        """Adapter name -> the state its layers share, for the active adapters that need the pass."""
        states: dict[str, NeedsFirstPass] = {}
        for name in active.call_names:
            adapter = self.layer.adapters._modules.get(name)
            state: Any = None if adapter is None else adapter._modules.get("shared")
            if isinstance(state, NeedsFirstPass):
                states[name] = state
        return states

    def prepare(self, module: nn.Module, call: dict[str, Any], active: ActiveAdapters, found: dict[str, Any]) -> None:
        contexts: Any = active.context
        first = _first_call(module, call)
        contexts.update({name: state.first_context for name, state in found.items()})
        hidden = _last_hidden_states(module, first)
        contexts.update({name: state.context(hidden) for name, state in found.items()})


def put_first_pass(model: nn.Module, layer: AdaptedLayer, change: Transaction) -> None:
    """Registers the hook for the first pass, once for each first layer.

    Args:
        model: the base model.
        layer: the first layer of an adapter.
        change: records the hooks of the model.
    """
    put_before_calls(model, _FirstPass(layer), change)


@torch.no_grad()
def _last_hidden_states(module: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """Makes the first pass, with only the backbone of the model if it has one.

    Raises:
        AdapterError: the model returns no hidden states.
    """
    backbone = getattr(module, str(getattr(module, "base_model_prefix", "")) or "", None)
    if isinstance(backbone, nn.Module):
        known = inspect.signature(backbone.forward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        output: Any = backbone(**{name: value for name, value in call.items() if takes_all or name in known})
    else:  # not ``module(...)``: the model's hooks, this one included, are for the call itself
        output = module.forward(**call, output_hidden_states=True)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        hidden = (getattr(output, "hidden_states", None) or (None,))[-1]
    if not isinstance(hidden, Tensor):
        raise AdapterError(f"{type(module).__name__} returns no hidden states, which the active adapter needs")
    return hidden


def _first_call(module: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the first pass; if the call fills a cache, it is created here and put into its arguments.

    Raises:
        AdapterError: the call continues a cache that the first pass has not seen.
    """
    first = {name: value for name, value in call.items() if name not in _ONLY_FOR_HEADS}
    if hasattr(module, "config"):
        first["return_dict"] = True
    name = cache_argument(module)
    if not name:
        return first
    first.pop("past_key_values", None)
    cache = take_cache(call, name)
    if cache is None and not fills_cache(module, call):
        return first | {"use_cache": False}
    from nbpeft.engine.calls.two_pass_cache import with_first_pass

    call[name] = with_first_pass(cache, module)
    return first | {name: call[name].first_pass, "use_cache": True}
