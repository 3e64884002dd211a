"""Description of a model's last training, for the model card of its adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbpeft.display.numbers import plural

if TYPE_CHECKING:
    from nbpeft.training.request import TrainRequest


@dataclass(frozen=True)
class TrainingCall:
    """The arguments of a training, without the data itself.

    Attributes:
        run_id: id of the run.
        data: description of the training data.
        eval_data: description of the evaluation data; empty without evaluation.
        arguments: the arguments that are plain values.
        columns: which columns of the data are asked and answered; empty if they have the usual names.
    """

    run_id: str
    data: str
    eval_data: str
    arguments: Mapping[str, Any] = field(repr=False, hash=False)
    columns: str = ""


def training_call(run_id: str, request: TrainRequest) -> TrainingCall:
    """Describes a training; stores neither rows nor anything that is not a plain value."""
    given = {name: value for name, value in request.given.items() if name != "data_hint"}
    plain = {name: value for name, value in given.items() if isinstance(value, str | int | float | bool)}
    evaluation = _describe_data(request.eval_data) if request.eval_data is not None else ""
    columns = ", ".join(f"{name} = {column}" for name, column in (request.columns or {}).items())
    return TrainingCall(run_id, _describe_data(request.data), evaluation, plain, columns)


def _describe_data(data: Any) -> str:
    """Return rows as text: what they are, or how many are held out; of a path only the last component."""
    if isinstance(data, Mapping):  # adapter -> its rows
        return "; ".join(f"{name}: {_describe_data(part)}" for name, part in data.items())
    if isinstance(data, int | float):
        return f"{data:.0%} of the rows" if data < 1 else f"{data} of the rows"
    if isinstance(data, str | os.PathLike):
        text = os.fspath(data)
        return text if _is_hub_name(text) else os.path.basename(os.path.normpath(text))
    parts = [_name_of(data)]
    columns = getattr(data, "column_names", None)
    if columns is None:
        columns = getattr(data, "columns", None)
    if columns is None and isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        columns = list(data[0])
    try:
        parts.append(plural(len(data), "row"))
    except TypeError:
        parts.append("a stream of rows")
    if columns is not None and (names := [str(name) for name in columns][:10]):
        parts.append(f"with {', '.join(names)}")
    return " ".join(part for part in parts if part)


def _name_of(data: Any) -> str:
    """Returns the name of a dataset of the hub, followed by a colon, or the empty string."""
    info = getattr(data, "info", None)
    name = getattr(info, "dataset_name", None) if info is not None and not callable(info) else None
    return f"{name}:" if isinstance(name, str) and name else ""


def _is_hub_name(text: str) -> bool:
    return text.count("/") == 1 and not os.path.exists(text) and not text.startswith((".", "/", "~"))
