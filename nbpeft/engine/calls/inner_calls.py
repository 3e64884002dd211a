"""Lets model adapters add to the outputs of modules inside the model: a hook on each of those modules.

Like the hooks of ``model_calls`` and every layer, it reads which adapters are active, so threads, ``use``, blends,
mixed batches and recomputation by checkpointing work here, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.prepared_calls import PlaceHook, put_at_places
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.model_adapter import AddsInside
from nbpeft.engine.wrappers.layer import AdaptedLayer


class _InnerHook(PlaceHook):
    """Adds the deltas of the active adapters to the output of a module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the deltas added; None if there are none. See ``nn.Module.register_forward_hook``."""
        active = self.layer.active_state.current()
        rows = active.rows
        result: Tensor = output[0] if isinstance(output, tuple) else output
        first, batch = result, len(result)
        for name, scale in zip(active.call_names, active.call_scales, strict=True):
            adapter: Any = self.layer.adapters._modules.get(name)
            if not isinstance(adapter, AddsInside) or self.path not in adapter.places:
                continue
            with self.layer.onloaded_parts():
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
    """Registers hooks that let an embedding's model adapters add to modules' outputs; once for each module.

    Args:
        model: the base model.
        layer: its adapted input embedding.
        change: records the hooks of the modules.
    """
    put_at_places(model, layer, AddsInside, change, after=_InnerHook)
