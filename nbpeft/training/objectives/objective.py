"""The base class of objectives, and their registry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nbpeft.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """The log-probabilities of a batch of completions of one kind, each of shape (rows,).

    Attributes:
        log_probs: sums over the tokens of each completion.
        reference: the same of the reference, without gradients; None if the objective has no reference.
        token_counts: number of tokens of each completion.
    """

    log_probs: Tensor
    reference: Tensor | None
    token_counts: Tensor

    @property
    def log_ratios(self) -> Tensor:
        """The log-probabilities relative to the reference."""
        return self.log_probs if self.reference is None else self.log_probs - self.reference


@dataclass(frozen=True)
class Objective:
    """What a training minimises. The fields of a subclass are fields of the training, with the names of TRL.

    The metadata of a field has its ``help`` and, if they can be listed, its ``choices``.

    Attributes:
        name: the name by which a training chooses it.
        rows: the kind of rows it takes, ``PAIRS``; empty if the model computes the loss itself.
        uses_reference: whether its loss compares the trained weights with a reference.
        defaults: fields of ``TrainingArguments`` whose defaults differ with it.
        metrics: names of the metrics that are reported of evaluations.
    """

    name: ClassVar[str]
    rows: ClassVar[str] = ""
    uses_reference: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}
    metrics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value has the wrong type or is not one of the choices.
        """
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices", ())
            usual = item.default
            if isinstance(usual, bool):
                valid, wanted = isinstance(value, bool), "True or False"
            elif isinstance(usual, float):
                valid, wanted = _is_number(value), "a finite number"
            else:
                valid, wanted = value in choices, f"one of {', '.join(map(str, choices))}"
            if not valid:
                hint = did_you_mean(str(value), choices) if choices else ""
                raise ConfigError(f"{item.name} must be {wanted}, not {value!r:.60}.{hint}", field=item.name)

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and what its curves show, each of shape (rows,).

        Args:
            chosen: the chosen completions.
            rejected: the rejected completion of each row.
        """
        raise NotImplementedError(f"the model computes the loss of {self.name}")

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {item.name: values[item.name] for item in dataclasses.fields(self) if values[item.name] != item.default}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_registered: dict[str, type[Objective]] = {}
Registered = TypeVar("Registered", bound=type[Objective])


def register(objective: Registered) -> Registered:
    """Registers an objective by its name; also a class decorator.

    Args:
        objective: a dataclass derived from :class:`Objective`.

    Raises:
        ConfigError: another objective has the name.
    """
    present = _registered.get(objective.name)
    if present is not None and (present.__module__, present.__qualname__) != (
        objective.__module__,
        objective.__qualname__,
    ):
        raise ConfigError(f"an objective {objective.name!r} is registered already: {present.__qualname__}")
    _registered[objective.name] = objective
    return objective


def names() -> tuple[str, ...]:
    """The names of all objectives."""
    return tuple(_registered)


def objective_named(name: Any) -> type[Objective]:
    """The objective with a name.

    Args:
        name: the name, as given.

    Raises:
        ConfigError: there is none.
    """
    found = _registered.get(name) if isinstance(name, str) else None
    if found is None:
        hint = did_you_mean(str(name), names()) or f" There are {', '.join(names())}."
        raise ConfigError(f"there is no objective {name!r:.60}.{hint}", field="objective")
    return found


def fields_by_name() -> dict[str, dict[str, dataclasses.Field[Any]]]:
    """Field -> objective -> the field, for all fields of all objectives."""
    found: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for name, objective in _registered.items():
        for item in dataclasses.fields(objective):
            found.setdefault(item.name, {})[name] = item
    return found
