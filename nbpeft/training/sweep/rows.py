"""Rows of their own for the adapters that are trained side by side, and the batches of each as if it trained alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbpeft.engine.changes.random_numbers import drawing_from, random_state, set_random_state
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, did_you_mean, few, near
from nbpeft.names import BOOKKEEPING_FIELDS
from nbpeft.sweeps import swept

if TYPE_CHECKING:
    from nbpeft.training.request import TrainRequest

_NO_COMMON = {
    "adapter": "data names the adapters to train",
    "processes": "they are trained in one process",
    "hosts": "they are trained in one process",
}
"""Arguments that adapters with rows of their own do not take, with the reason."""
_CLOSE = 0.8
"""The ``difflib`` ratio above which a key of a dictionary is a misspelled adapter."""
_SAME_DRAWS = ("r", "lora_alpha", "use_rslora", "init_lora_weights")
"""Fields of a config that do not change which random numbers are drawn for dropout."""


def with_own_rows(request: TrainRequest) -> TrainRequest:
    """Returns the request with the adapters as members to which ``data`` gives rows by name; itself without such data.

    Rows of a single adapter are those of a training of that adapter.

    Raises:
        ConfigError: the rows are not those of adapters of the model, or an argument does not support several adapters.
    """
    data, manager = request.data, manager_of(request.model)
    if not isinstance(data, Mapping) or manager is None or not _names_adapters(data, manager.configs):
        return request
    _check_rows(request, data, manager.configs)
    members = request.members
    if isinstance(members, Mapping):
        _check_same_names(members, data, "members")
    if len(data) == 1 and members is None:
        (name,) = data
        if request.adapter not in (None, name):
            raise ConfigError(f"data has rows for {name!r}, but adapter is {request.adapter!r:.60}", field="adapter")
        return dataclasses.replace(request.of_adapter(name), adapter=name)
    for name, reason in _NO_COMMON.items():
        if getattr(request, name) is not None:
            raise ConfigError(f"{name} cannot be combined with rows for each adapter: {reason}", field=name)
    if several := next(iter(swept(request.given)), None):
        raise ConfigError(
            f"{several} is a sweep, but data has rows for each adapter: give each its value with members="
            f"{{{next(iter(data))!r}: {{{several!r}: …}}, …}}",
            field=several,
        )
    return dataclasses.replace(request, members={name: {} for name in data} if members is None else members)


def _check_rows(request: TrainRequest, data: Mapping[str, Any], adapters: Collection[str]) -> None:
    """Refuses rows that are not those of adapters of the model."""
    for field in ("data", "eval_data"):
        _refuse_splits(getattr(request, field), field)
    if unknown := [name for name in data if name not in adapters]:
        raise ConfigError(
            f"data has rows for {few(unknown)}, which the model does not have (adapters: {few(adapters)})."
            f"{did_you_mean(str(unknown[0]), adapters)}",
            field="data",
        )
    if nested := next((name for name, part in data.items() if isinstance(part, Mapping)), None):
        raise ConfigError(f"the rows of {nested!r} in data are a dictionary: pass a list of rows", field="data")
    if isinstance(request.eval_data, Mapping):
        _check_same_names(request.eval_data, data, "eval_data")
        if without := [name for name, part in request.eval_data.items() if part is None]:
            raise ConfigError(f"there are no evaluation rows for {few(without)}: each needs some", field="eval_data")


def _names_adapters(data: Mapping[Any, Any], adapters: Collection[str]) -> bool:
    """Returns whether a dictionary has rows by the names of adapters, right or nearly so, and not columns or splits."""
    return any(name in adapters or near(str(name), adapters, cutoff=_CLOSE) for name in data)


def _refuse_splits(data: Any, field: str) -> None:
    """Refuses a ``DatasetDict``: its keys are splits, also where an adapter has the name of one."""
    if isinstance(data, Mapping) and type(data).__name__.endswith("DatasetDict"):
        raise ConfigError(
            f"{field} is a DatasetDict: {few(data)} are its splits, not adapters; pass one of them", field=field
        )


def _check_same_names(given: Mapping[str, Any], data: Mapping[str, Any], field: str) -> None:
    if {*given} != {*data}:
        what = "evaluation rows are those of" if field == "eval_data" else "adapters to train are"
        raise ConfigError(f"data has rows for {few(data)}, but the {what} {few(given) or 'none'}", field=field)


def draw_apart(configs: Sequence[AdapterConfig]) -> bool:
    """Returns whether adapters draw different random numbers in a training step, e.g. only one of them has dropout."""
    draws = [_drawing(config) for config in configs]
    return any(draws) and any(one != draws[0] for one in draws)


def _drawing(config: AdapterConfig) -> dict[str, Any]:
    """Returns what decides which random numbers an adapter draws; empty if it draws none."""
    fields, varied = config.to_dict(), method_of(config).draws_in_training
    rates = {name: rate for name, rate in fields.items() if name.endswith("dropout") and rate}
    if not rates and not varied:
        return {}
    left_out = (*BOOKKEEPING_FIELDS, *(() if varied else _SAME_DRAWS))
    if 0 < rates.get("lora_dropout", 0) < 1:
        left_out += ("lora_dropout",)  # each of these rates draws a number for each input
    return {name: value for name, value in fields.items() if name not in left_out}


class OwnRows:
    """The rows of one adapter, and its batches in the order and with the random numbers of a training alone.

    Attributes:
        loader: loads the batches of an epoch; None before training starts.
        steps: number of its optimizer steps; set when training starts.
    """

    loader: Any = None
    steps: int

    def __init__(self, train: Any, evaluation: Any) -> None:
        self.train, self.evaluation = train, evaluation
        self._random: dict[str, Any] = {}
        self._before_step: dict[str, Any] | None = None
        self._batches: Iterator[tuple[list[Any], Any]] | None = None

    def begin(self, loader: Any, steps: int) -> None:
        """Begins a training with the current random numbers."""
        self.loader, self.steps, self._batches = loader, steps, None
        self.random = random_state()

    def copied(self) -> OwnRows:
        """Returns the same rows at the same point for a copy of the adapter."""
        other = OwnRows(self.train, self.evaluation)
        other.steps, other.random = self.steps, self.random
        return other

    @property
    def random(self) -> dict[str, Any]:
        """The random state at the end of the last complete step."""
        return self._random if self._before_step is None else self._before_step

    @random.setter
    def random(self, state: dict[str, Any]) -> None:
        self._random, self._before_step = state, None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Context manager: draws the adapter's own random numbers inside."""
        with drawing_from(self._random):
            try:
                yield
            finally:
                self._random = random_state()

    def next_step(self, batches: Callable[[OwnRows], Iterator[tuple[list[Any], Any]]]) -> tuple[list[Any], Any]:
        """Returns the batches of the next optimizer step, and the number of their tokens to learn.

        Args:
            batches: called once: yields them for each step from the current one on.
        """
        self._before_step = self._random
        with self.drawing():
            if self._batches is None:
                self._batches = batches(self)
            return next(self._batches)

    def end_step(self) -> None:
        """Ends an optimizer step, to which the random numbers drawn up to now belong."""
        self._before_step = None


def batches_from(
    loader: Any,
    step: int,
    size: int,
    take: Callable[[Iterator[Any], int], tuple[list[Any], Any]],
    begin_epoch: Callable[[int], None],
) -> Iterator[tuple[list[Any], Any]]:
    """Yields the batches of each optimizer step without an end, like a Trainer that trains one adapter.

    Args:
        loader: loads the batches of an epoch.
        step: number of optimizer steps that were done before.
        size: number of batches of a step; the last step of an epoch may have fewer.
        take: takes up to so many batches from an iterator, and counts their tokens.
        begin_epoch: called with the number of complete epochs before each epoch.
    """
    from accelerate import skip_first_batches  # which a package without training does not need

    epoch, done = divmod(step, steps_of_epoch(loader, size))
    while True:
        begin_epoch(epoch)
        state = random_state() if done else None  # a resumed epoch drew its numbers when it began
        rest = skip_first_batches(loader, done * size) if done else loader
        if hasattr(rest, "set_epoch"):
            rest.set_epoch(epoch)
        batches = iter(rest)
        while (taken := take(batches, size))[0]:
            if state is not None:
                set_random_state(state)
                state = None
            yield taken
        epoch, done = epoch + 1, 0


def steps_of_epoch(loader: Any, size: int) -> int:
    """Returns the number of optimizer steps of an epoch."""
    return -(-len(loader) // size)
