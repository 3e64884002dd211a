"""Lets model adapters add to what modules inside the model give: a hook on each of those modules.

As the hooks of ``model_calls`` it reads what is active as every layer does, so threads, ``use``, blends and mixed
batches act here too, and what checkpointing computes again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_calls import LayerHook
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.model_adapter import AddsInside, RunsBeside
from nbpeft.engine.tree.model_tree import walk
from nbpeft.engine.wrappers.layer import AdaptedLayer


class PlaceHook(LayerHook):
    """A hook on a module inside the model.

    Args:
        layer: the adapted input embedding, where the model adapters hang.
        path: of the module, in the base model.
    """

    def __init__(self, layer: AdaptedLayer, path: str) -> None:
        super().__init__(layer)
        self.path = path


class _InnerHook(PlaceHook):
    """Adds what the active adapters add to the output of a module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with what is added; None where nothing is. See ``nn.Module.register_forward_hook``."""
        active = self.layer.active_state.current()
        rows = active.rows
        names, scales = (active.names, active.scales) if rows is None else (rows.names, rows.scales)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        first, batch = result, len(result)
        for name, scale in zip(names, scales, strict=True):
            adapter: Any = self.layer.adapters._modules.get(name)
            if not isinstance(adapter, AddsInside) or self.path not in adapter.places:
                continue
            added = adapter.addition(self.path, module, args, kwargs, 1 if rows is None else batch)
            if scale != 1.0:
                added = added * scale
            if rows is not None:
                served = rows.repeat_to(batch, added.device) == rows.names.index(name)
                added = torch.where(served.view(-1, *[1] * (added.ndim - 1)), added, 0.0)
            result = result + added.to(result)
        if result is first:
            return None
        return (result, *output[1:]) if isinstance(output, tuple) else result


def put_inner_hooks(model: nn.Module, layer: AdaptedLayer, change: Transaction) -> None:
    """Lets the adapters of an adapted embedding add to what modules of a model give; once for each module.

    Args:
        model: the base model.
        layer: its input embedding.
        change: records the hooks of the modules.
    """
    put_at_places(model, layer, AddsInside, change, behind=_InnerHook)


def put_at_places(
    model: nn.Module,
    layer: AdaptedLayer,
    kind: type[AddsInside] | type[RunsBeside],
    change: Transaction,
    *,
    behind: type[PlaceHook],
    before: type[PlaceHook] | None = None,
) -> None:
    """Puts hooks on the modules at which adapters of an adapted embedding act; once on each module.

    Args:
        model: the base model.
        layer: its input embedding.
        kind: which of its adapters.
        change: records the hooks of the modules.
        behind: class of the hooks behind the modules.
        before: class of those in front of them, if any.
    """
    adapters = [adapter for adapter in layer.adapters._modules.values() if isinstance(adapter, kind)]
    places = {path for adapter in adapters for path in adapter.places}
    for site in walk(model) if places else ():
        module = site.module
        present = any(type(hook) is behind and hook.layer is layer for hook in module._forward_hooks.values())
        if present or site.path not in places:
            continue
        change.keep(module._forward_hooks, module._forward_hooks_with_kwargs)
        module.register_forward_hook(behind(layer, site.path), with_kwargs=True)
        if before is not None:
            change.keep(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            module.register_forward_pre_hook(before(layer, site.path), with_kwargs=True)
