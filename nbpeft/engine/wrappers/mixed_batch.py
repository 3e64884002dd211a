"""The output of an adapted layer for a mixed batch, in which each row has its own adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nbpeft.engine.changes.active_state import ActiveAdapters, RowAssignment
from nbpeft.engine.contract.adapter import FusesAdd, ServesRows, TransformsInput, TransformsOutput
from nbpeft.engine.kernels.numerics import add_delta
from nbpeft.engine.kernels.recomputed import parts_of
from nbpeft.engine.wrappers.row_order import check_row_order


def mixed_output(layer: Any, x: Tensor, output: Tensor, active: ActiveAdapters, rows: RowAssignment) -> Tensor:
    """Computes the output of a layer for a mixed batch.

    Args:
        layer: the adapted layer, an ``AdaptedLayer``.
        x: the layer's input, rows first.
        output: the base layer's output, rows first.
        active: the active adapters of the call.
        rows: the adapter of each row.

    Returns:
        The sum, shaped and typed like the output.

    Raises:
        AdapterError: the shape of the input shows that it is not in the order of the rows.
    """
    adapters = layer.adapters._modules
    present = [name for name in rows.names if name in adapters]
    if not present:
        return output
    x, output = rows.broadcast(x), rows.broadcast(output)
    check_row_order(rows, x, layer)
    batch = output.shape[0]
    if layer.training:
        return _learning_output(layer, x, output, active, rows)
    kinds = {type(layer.adapter(name)) for name in present}
    prepared = any(name in active.context for name in present)
    if not prepared and len(kinds) == 1 and issubclass(serving := kinds.pop(), ServesRows):
        kept = rows.cache.setdefault(id(layer), {})
        found: list[Any] = [adapters.get(name) for name in rows.names]
        served = serving.mixed(found, rows.scales, layer.own_base(), kept)
        if served is not None:
            return add_delta(output, served(x, rows.repeat_to(batch, x.device)))
    result = output.clone()
    for name in present:
        chosen = rows.rows_of(name, batch, output.device)
        if len(chosen):
            base = layer.base_in(active, name)
            base = base if base.context is None else base.within(_rows_of(base.context, chosen, batch))
            delta = layer.adapter(name)(x[chosen], output[chosen], base) * rows.scales[rows.names.index(name)]
            result[chosen] = add_delta(output[chosen], delta)
    return result


def _learning_output(layer: Any, x: Tensor, output: Tensor, active: ActiveAdapters, rows: RowAssignment) -> Tensor:
    """The output for a mixed batch in training mode.

    The random state is reset for each adapter, so that dropout is the same as in a batch of that adapter only.
    """
    runs = rows.runs(len(output))
    sizes = [run.stop - run.start for _, run in runs]
    parts, drawn = [], torch.get_rng_state()
    for (name, run), own_x, own_output in zip(runs, parts_of(x, sizes), torch.split(output, sizes), strict=True):
        torch.set_rng_state(drawn)
        parts.append(_output_of_rows(layer, own_x, own_output, active, rows, name, run))
    return torch.cat(parts)


def _output_of_rows(
    layer: Any, x: Tensor, output: Tensor, active: ActiveAdapters, rows: RowAssignment, name: str, run: slice
) -> Tensor:
    """The output for neighbouring rows with one adapter; the rows are views, so autograd stores no copy."""
    adapter: Any = layer.adapters._modules.get(name)
    if adapter is None:
        return output
    base = layer.base_in(active, name)
    base = base if base.context is None else base.within(_rows_of(base.context, run, len(rows.index)))
    scale = rows.scales[rows.names.index(name)]
    if scale == 1.0 and isinstance(adapter, TransformsOutput) and not isinstance(adapter, TransformsInput):
        return adapter.transform_output(output, base)
    if scale == 1.0 and isinstance(adapter, FusesAdd):
        fusing: Any = adapter
        return fusing(x, output, base, True)
    return add_delta(output, adapter(x, output, base) * scale)


def _rows_of(context: Any, chosen: Tensor | slice, batch: int) -> Any:
    """The part of a call's context for some rows, if it is a tensor with one entry for each row."""
    if not isinstance(context, Tensor) or context.ndim == 0 or batch % context.shape[0]:
        return context
    # Beam search computes with several rows for each row of the call.
    each = batch // context.shape[0]
    rows = torch.arange(batch)[chosen] if isinstance(chosen, slice) else chosen
    return context[rows.to(context.device).div(each, rounding_mode="floor")]
