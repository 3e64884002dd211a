"""What is scored, and how: the columns, the batches, and how tokens are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft._util.numeric import check_sampling
from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.engine.config.adapter_names import BASE_NAME
from nbpeft.engine.contract.model_adapter import HasSideNetwork
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model.handle.serving import blended
from nbpeft.scoring.metrics import Metric, generates
from nbpeft.training.monitor.failures import free_memory

BASE = "base"
_ROWS, _SEQUENCES = 8, 32
"""The least number of rows in one generation by default, and the number of answers up to which there are more."""


@dataclass(frozen=True)
class Column:
    """What answers: the base model, an adapter, the sum of several, or the model as it is.

    Attributes:
        title: ``base``, the name of the adapter, or ``a+b``.
        names: the adapters; empty for the base model.
        row: the name for its rows of a mixed batch; empty for a column that needs a batch of its own.
        as_it_is: whether the model is called as it is: without adapters, or with merged ones.
        folder: where the adapter is, if it is not on the model.
    """

    title: str
    names: tuple[str, ...] = ()
    row: str = ""
    as_it_is: bool = False
    folder: str = ""


@dataclass(frozen=True)
class ScoreSettings:
    """How rows are answered.

    Attributes:
        max_new_tokens: the limit of an answer; None for one that fits the references.
        batch_size: rows that are answered together, by every column; None for a default.
        seed: seed of the bootstrap, and of sampled answers.
        temperature: divisor of the logits; 0 is greedy, and so is None without ``top_p``, with which it is 1.
        top_p: sample from the most likely tokens whose probabilities sum up to this value.

    Raises:
        ConfigError: a value is invalid.
    """

    max_new_tokens: int | None = None
    batch_size: int | None = None
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r:.40}", field=name)
        check_sampling(self.temperature, self.top_p, self.seed)
        if self.top_p is not None and not self.draws:
            raise ConfigError("top_p has no effect on greedy answers: sampling needs a temperature above 0")

    @property
    def draws(self) -> bool:
        """Whether tokens are sampled."""
        return bool(self.top_p if self.temperature is None else self.temperature)

    def check_for(self, metrics: Sequence[Metric]) -> None:
        """Refuses settings of answers where none is generated.

        Raises:
            ConfigError: one is given, and no metric needs answers.
        """
        sampled = ("top_p" if self.temperature is None else "temperature") if self.draws else None
        given = sampled or ("max_new_tokens" if self.max_new_tokens is not None else None)
        if given is not None and not generates(metrics):
            raise ConfigError(f"{given} is for metrics of answers: nothing is generated here", field=given)

    def rows_together(self, columns: int) -> int:
        """The number of rows in one generation."""
        return self.batch_size or max(_ROWS, _SEQUENCES // columns)


def columns_of(
    model: nn.Module, adapters: Any, include_base: bool, *, others: bool = False
) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """The columns that are scored.

    Args:
        model: the model, adapted or bare.
        adapters: names of adapters, ``a+b`` for the sum of two; ``base`` for the base model; None for all adapters.
        include_base: whether the base model is scored.
        others: whether there are other columns than those of the model.

    Returns:
        The columns, the base first; and messages for the user.

    Raises:
        AdapterError: there is no such adapter, it is merged, or nothing is left to score.
    """
    manager = manager_of(model)
    if adapters is not None and not isinstance(adapters, str | list | tuple):
        raise AdapterError(f"adapters must be names of adapters, not {adapters!r:.60}")
    given = None if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    if manager is None:
        if given:
            raise AdapterError(f"the model has no adapters, so that {given[0]!r:.60} cannot be scored")
        if not include_base and not others:
            raise AdapterError("nothing to score: the model has no adapters, and include_base=False")
        return (Column(BASE, as_it_is=True),) if include_base else (), ()
    if manager.merged:
        merged = "+".join(manager.merged)
        if given is not None and given != [merged]:
            manager.refuse_merged("scoring other adapters")
        note = "it is in the base weights, so that the base and other adapters cannot be scored: unmerge it first"
        return (Column(merged, manager.merged, as_it_is=True),), (f"only {merged!r} is scored: {note}",)
    names = list(manager.names) if given is None else list(dict.fromkeys(given))
    if BASE in names and BASE not in manager.names:
        names.remove(BASE)
        include_base = True
    found = [_column(manager, name) for name in names]
    if include_base:
        found.insert(0, Column(BASE if BASE not in manager.names else f"({BASE})", row=BASE_NAME))
    if not found and not others:
        raise AdapterError("nothing to score: no adapters, and include_base=False")
    return tuple(found), ()


def adapter_columns(model: nn.Module, names: Sequence[str]) -> tuple[Column, ...]:
    """The columns of adapters of a model."""
    manager = manager_of(model)
    return tuple(_column(manager, name) for name in names)


def parts_of(name: str, available: Callable[[str], bool]) -> tuple[str, ...]:
    """The adapters that a name to score stands for: one of that name, else those of a sum (``a+b``).

    Args:
        name: a name, or several with ``+`` between them.
        available: whether there is an adapter of a name.
    """
    if "+" not in name or available(name):
        return (name,)
    return tuple(dict.fromkeys(part.strip() for part in name.split("+")))


def _column(manager: Any, name: object) -> Column:
    """The column of an adapter, or of the sum of several."""
    if isinstance(name, str) and (parts := parts_of(name, manager.available)) != (name,):
        manager.require_available(*parts)
        return Column("+".join(parts), parts)
    manager.require_available(name)
    text = str(name)
    config = manager.configs.get(text)  # None for an adapter that is loaded when it is used
    alone = config is not None and issubclass(method_of(config).adapter_class, HasSideNetwork)
    return Column(text, (text,), row="" if alone else text)


def serving_alone(model: nn.Module, column: Column) -> AbstractContextManager[None]:
    """Context manager: the calls in the block are computed by one column that is not part of a mixed batch."""
    manager = manager_of(model)
    if column.as_it_is or manager is None:
        return nullcontext()
    return blended(manager, dict.fromkeys(column.names, 1.0))


def passes(columns: Sequence[Column]) -> list[list[int]]:
    """The columns of each pass, by index: those of mixed batches together, each of the others alone."""
    mixed = [place for place, column in enumerate(columns) if column.row]
    alone = [[place] for place, column in enumerate(columns) if not column.row]
    return [mixed, *alone] if mixed else alone


def batches(lengths: Sequence[int], size: Callable[[int], int]) -> Iterator[list[int]]:
    """Rows of about the same length together, the longest first, so that a lack of memory shows at once.

    Args:
        lengths: the length of each row.
        size: length of the longest row of a batch -> the greatest number of rows in it.

    Yields:
        The indices of the rows of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        count = max(1, size(lengths[order[start]]))
        yield order[start : start + count]
        start += count


def in_parts(compute: Callable[[Sequence[int]], list[Any] | None], places: Sequence[int]) -> list[Any] | None:
    """Computes something for rows together, or in parts if the device has not enough memory for that.

    Args:
        compute: rows, by index -> the results; None if it was stopped.
        places: the rows.

    Returns:
        The results of all parts; None if one was stopped.

    Raises:
        AdapterError: there is not enough memory for one row.
    """
    try:
        return compute(places)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(places) == 1:
            raise AdapterError(
                "out of memory with one row: score fewer adapters at a time, or shorter answers (max_new_tokens=…)"
            ) from None
    free_memory()  # out here the error no longer holds the tensors of the call
    found: list[Any] = []
    for part in (places[: len(places) // 2], places[len(places) // 2 :]):
        results = in_parts(compute, part)
        if results is None:
            return None
        found += results
    return found
