"""Which adapters serve a call: the active ones, one for each row of a mixed batch, or a weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nbpeft.engine.changes.active_state import NO_ADAPTERS, ActiveAdapters, RowAssignment, other_row_count
from nbpeft.engine.config.adapter_names import BASE_NAME
from nbpeft.engine.contract.combination import check_weights
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import call_arguments, in_call, prepared
from nbpeft.engine.wrappers.row_order import note_calls
from nbpeft.errors import AdapterError

OF_CALLS = ("adapter_names", "alora_offsets")
"""PEFT's arguments of calls."""


@contextmanager
def serving(
    manager: AdapterManager,
    adapter_names: Sequence[str] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    training: bool,
) -> Iterator[None]:
    """Context manager around one call of a model, with the active adapters or with one adapter for each row.

    Args:
        manager: manager of the model.
        adapter_names: one name per row, or None for the active adapters. While adapters are disabled, all rows are
            computed by the base model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        training: whether the model is in training mode.

    Raises:
        AdapterError: the names are invalid, or the model is in training mode.
    """
    if adapter_names is None:
        # Evaluated inside the call: before it, another thread may still remove an adapter.
        with manager.active_state.call(lambda: prepared(manager.configs, manager.active_state.current(), args, kwargs)):
            yield
        return
    if training:
        raise AdapterError("adapter_names is for inference: call model.eval() first")
    with serving_rows(manager, adapter_names, args, kwargs):
        yield


def of_the_model(
    manager: AdapterManager, kwargs: Mapping[str, Any], special: Collection[str] = OF_CALLS
) -> dict[str, Any]:
    """Returns the keyword arguments of a call without those that only adapters use.

    Args:
        manager: manager of the model.
        kwargs: keyword arguments of the call.
        special: arguments that are left out whichever adapters the model has.
    """
    own = {*call_arguments(manager.configs.values()), *special}
    return {name: value for name, value in kwargs.items() if name not in own}


@contextmanager
def serving_rows(
    manager: AdapterManager,
    adapter_names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    disabled_too: bool = False,
) -> Iterator[None]:
    """Context manager around calls with one adapter for each row.

    Args:
        manager: manager of the model.
        adapter_names: one name per row.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        disabled_too: apply the adapters even while they are disabled.

    Raises:
        AdapterError: the names are invalid.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Iterable):
        raise AdapterError("adapter_names must be a list with one name for each row of the batch")
    names = list(adapter_names)
    strange = next((name for name in names if not isinstance(name, str)), None)
    if strange is not None:
        raise AdapterError(f"adapter_names must have one name for each row of the batch, not {strange!r}")
    # Rows are assigned inside the call for the same reason.
    with (
        manager.ensure_loaded(names),
        manager.active_state.call(lambda: _assigned(manager, names, args, kwargs, disabled_too=disabled_too)),
        note_calls(manager.model, manager.active_state),
    ):
        yield


def _assigned(
    manager: AdapterManager,
    adapter_names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    disabled_too: bool,
) -> ActiveAdapters:
    """Returns the active adapters of a mixed batch, whose size is that of the first tensor among the arguments."""
    if manager.merged:
        raise AdapterError(f"adapter_names needs unmerged weights, but {manager.merged[0]!r} is merged")
    batch = next((value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor)), None)
    if batch is not None and len(batch) != len(adapter_names):
        raise other_row_count(len(adapter_names), len(batch))
    names = tuple(dict.fromkeys(name for name in adapter_names if name != BASE_NAME))
    manager.require(*names)
    if not manager.enabled and not disabled_too:
        return NO_ADAPTERS
    order = {name: position for position, name in enumerate(names)}
    index = tuple(order.get(name, -1) for name in adapter_names)
    active = ActiveAdapters(rows=RowAssignment(names, index, tuple(manager.scale(name) for name in names)))
    return in_call(manager.configs, active, args, kwargs)


@contextmanager
def blended(manager: AdapterManager, weights: Mapping[str, float]) -> Iterator[None]:
    """Context manager: applies a weighted sum of adapters in this thread's calls inside the block.

    The sum is exact and needs no memory, because each adapter runs with its own factor. The active adapters of other
    threads do not change. Each weight multiplies the adapter's current scale.

    Args:
        manager: manager of the model.
        weights: adapter name -> weight; 0 skips the adapter, a negative weight subtracts it.

    Raises:
        UnknownAdapterError: there is no such adapter.
        AdapterError: a weight is not finite.
        MergeError: adapters are merged.
    """
    check_weights(tuple(weights), tuple(weights.values()))
    manager.refuse_merged("blending")
    names = tuple(name for name, weight in weights.items() if weight)
    manager.require_available(*weights)

    def chosen() -> ActiveAdapters:
        manager.refuse_merged("blending")
        manager.require(*names)
        scales = tuple(weights[name] * manager.scale(name) for name in names)
        return ActiveAdapters(names, scales) if names else NO_ADAPTERS

    with manager.ensure_loaded(names), manager.active_state.call(chosen):
        yield
