"""Mixed batches: which adapter serves which row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from nbpeft.engine.holder import BASE_NAME
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.switch import Active, Rows
from nbpeft.errors import AdapterError


def assigned_rows(manager: AdapterManager, adapter_names: Sequence[str], inputs: Iterable[object]) -> Active:
    """What acts in a call whose rows are served by different adapters.

    Args:
        manager: has the adapters.
        adapter_names: one name for each row, ``"__base__"`` for none.
        inputs: arguments of the call; the first tensor among them tells the number of rows.

    Raises:
        AdapterError: a name is unknown, their number is wrong, or weights are merged.
    """
    if manager.merged:
        raise AdapterError(f"adapter_names needs unmerged weights, but {manager.merged[0]!r} is merged")
    if isinstance(adapter_names, str):
        raise AdapterError("adapter_names must be a list with one name for each row of the batch")
    batch = next((value for value in inputs if isinstance(value, Tensor)), None)
    if batch is not None and len(batch) != len(adapter_names):
        raise AdapterError(
            f"adapter_names has {len(adapter_names)} names for {len(batch)} rows: give one name for each row"
        )
    names = tuple(dict.fromkeys(name for name in adapter_names if name != BASE_NAME))
    manager.require(*names)
    order = {name: position for position, name in enumerate(names)}
    index = tuple(order.get(name, -1) for name in adapter_names)
    return Active(rows=Rows(names, index, tuple(manager.scale(name) for name in names)))
