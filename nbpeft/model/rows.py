"""Mixed batches: which adapter serves which row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from nbpeft.engine.holder import BASE_NAME
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.switch import NOTHING, Active, Rows
from nbpeft.errors import AdapterError


@contextmanager
def serving(
    manager: AdapterManager, adapter_names: Sequence[str] | None, inputs: Iterable[object], *, training: bool
) -> Iterator[None]:
    """Context manager around one call of a model, with the active adapters or with one adapter for each row.

    Args:
        manager: of the model.
        adapter_names: one name for each row, or None. While adapters are disabled the base serves all.
        inputs: arguments of the call.
        training: whether the model is in training mode.

    Raises:
        AdapterError: the names do not fit, or the model trains.
    """
    if adapter_names is None:
        with manager.switch.call():
            yield
        return
    if training:
        raise AdapterError("adapter_names is for inference: call model.eval() first")
    with serving_rows(manager, adapter_names, inputs):
        yield


@contextmanager
def serving_rows(
    manager: AdapterManager, adapter_names: Sequence[str], inputs: Iterable[object], *, disabled_too: bool = False
) -> Iterator[None]:
    """One call, or several, with an adapter for each row.

    Args:
        manager: has the adapters.
        adapter_names: one name for each row.
        inputs: arguments of the call.
        disabled_too: let them act even while adapters are disabled.

    Raises:
        AdapterError: the names do not fit.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Iterable):
        raise AdapterError("adapter_names must be a list with one name for each row of the batch")
    names = list(adapter_names)
    strange = next((name for name in names if not isinstance(name, str)), None)
    if strange is not None:
        raise AdapterError(f"adapter_names must have one name for each row of the batch, not {strange!r}")
    # Rows are assigned inside the call: before it, another thread may still take an adapter out.
    with (
        manager.supplied(names),
        manager.switch.call(lambda: assigned_rows(manager, names, inputs, disabled_too=disabled_too)),
    ):
        yield


def assigned_rows(
    manager: AdapterManager, adapter_names: Sequence[str], inputs: Iterable[object], *, disabled_too: bool = False
) -> Active:
    """What acts in a call whose rows are served by different adapters.

    Args:
        manager: has the adapters.
        adapter_names: one name for each row, ``"__base__"`` for none.
        inputs: arguments of the call; the first tensor among them tells the number of rows.
        disabled_too: let them act even while adapters are disabled.

    Raises:
        AdapterError: a name is unknown, their number is wrong, or weights are merged.
    """
    if manager.merged:
        raise AdapterError(f"adapter_names needs unmerged weights, but {manager.merged[0]!r} is merged")
    batch = next((value for value in inputs if isinstance(value, Tensor)), None)
    if batch is not None and len(batch) != len(adapter_names):
        raise AdapterError(
            f"adapter_names has {len(adapter_names)} names for {len(batch)} rows: give one name for each row"
        )
    names = tuple(dict.fromkeys(name for name in adapter_names if name != BASE_NAME))
    manager.require(*names)
    if not manager.enabled and not disabled_too:
        return NOTHING
    order = {name: position for position, name in enumerate(names)}
    index = tuple(order.get(name, -1) for name in adapter_names)
    return Active(rows=Rows(names, index, tuple(manager.scale(name) for name in names)))
