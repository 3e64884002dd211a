"""The base class of objectives, and their registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nbpeft._util.numeric import is_finite_number
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.names import PAIRS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """The log-probabilities of a batch of completions of one kind, each of shape (rows,).

    Attributes:
        log_probs: sums over the tokens of each completion.
        reference: the same of the reference, without gradients; None if the objective has no reference.
        token_counts: number of tokens of each completion.
        mean_count: mean number of tokens of the chosen completions of all batches whose gradients are accumulated; in
            the mean over rows ``log_probs / mean_count`` is the log-probability per token. A scalar.
        prompts: the same of the prompts, for an objective that learns them; else None.
        margins: the margins of the rows, if they have any.
        desirable: 1 for good completions and 0 for bad ones, if the rows say so.
    """

    log_probs: Tensor
    reference: Tensor | None
    token_counts: Tensor
    mean_count: Tensor
    prompts: Completions | None = None
    margins: Tensor | None = None
    desirable: Tensor | None = None

    @property
    def averages(self) -> Tensor:
        """The log-probabilities per token."""
        return self.log_probs / self.token_counts

    @property
    def log_ratios(self) -> Tensor:
        """The log-probabilities relative to the reference."""
        return self.log_probs if self.reference is None else self.log_probs - self.reference


@dataclass(frozen=True)
class Objective:
    """What a training minimizes. The fields of a subclass are fields of the training, with the names of TRL.

    The metadata of a field has its ``help`` and, if they can be listed, its ``choices``.

    Attributes:
        name: the name by which a training chooses it.
        rows: the kind of rows it takes: ``PAIRS``, ``SCORED_PAIRS`` or ``PROMPTS``; empty if the model computes the
            loss itself.
        uses_reference: whether its loss compares the trained weights with a reference.
        scores: whether it trains the one logit of a classifier, and not the log-probabilities of a language model.
        generates: whether the model answers the rows' prompts, and reward functions score the answers.
        learns_prompts: whether its loss needs the log-probabilities of the prompts of chosen completions, too.
        rate_factor: its default learning rate, relative to that of ``sft``.
        learns_second: whether the second completion of each row has gradients; else the second completions are those
            of all batches whose gradients are accumulated, computed without, and given as one mean of all processes.
        metrics: names of the curves that say whether it learns, the most telling one first, also of evaluations.
    """

    name: ClassVar[str]
    rows: ClassVar[str] = ""
    uses_reference: ClassVar[bool] = False
    scores: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    learns_prompts: ClassVar[bool] = False
    learns_second: ClassVar[bool] = True
    rate_factor: ClassVar[float] = 1.0
    metrics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: a value has the wrong type or is not one of the choices.
        """
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices", ())
            usual = item.default
            if usual is None and value is None:
                continue
            if isinstance(usual, bool):
                valid, wanted = isinstance(value, bool), "True or False"
            elif choices:
                same = (type(value) is type(choice) and value == choice for choice in choices)  # 1 == True
                valid, wanted = any(same), f"one of {', '.join(map(str, choices))}"
            elif isinstance(usual, int):
                least = item.metadata.get("least", 0)
                valid, wanted = type(value) is int and value >= least, f"a whole number of at least {least}"
            elif item.metadata.get("listed"):
                valid = isinstance(value, list | tuple) and all(map(is_finite_number, value))
                wanted = "a list of numbers"
            else:
                valid, wanted = is_finite_number(value), "a finite number"
            if not valid:
                hint = did_you_mean(str(value), [name for name in choices if isinstance(name, str)])
                raise ConfigError(f"{item.name} must be {wanted}, not {value!r:.60}.{hint}", field=item.name)

    def loss(self, chosen: Completions, rejected: Completions) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the losses of the rows of a batch, and what its curves show, each of shape (values,).

        The loss of a step is the mean over all rows, however many batches they are divided among: the loss of a row
        must not depend on the other rows of its batch.

        Args:
            chosen: the chosen completions.
            rejected: the rejected completion of each row.
        """
        raise NotImplementedError(f"the model computes the loss of {self.name}")

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Further curves, computed from the means of the others.

        Args:
            means: name of a curve -> mean of its values since the last log, without curves that have no value.
        """
        return {}

    @classmethod
    def headline(cls) -> tuple[str, ...]:
        """The curves by which a training is judged: its metrics and its loss, unless that is relative within a step."""
        return cls.metrics if cls.generates else (*cls.metrics, "loss")

    @property
    def reference_needed(self) -> bool:
        """Whether its loss, with these fields, compares the trained weights with a reference."""
        return self.uses_reference

    @classmethod
    def own_fields(cls) -> tuple[str, ...]:
        """The fields that can differ between the adapters of a sweep, which share batches and their dropout."""
        return tuple(item.name for item in dataclasses.fields(cls) if item.name != "disable_dropout")

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {item.name: values[item.name] for item in dataclasses.fields(self) if values[item.name] != item.default}


@dataclass(frozen=True)
class PairObjective(Objective):
    """An objective that compares the chosen completion of each row with the rejected one."""

    rows: ClassVar[str] = PAIRS
    rate_factor: ClassVar[float] = 0.1
    metrics: ClassVar[tuple[str, ...]] = ("rewards/margins", "rewards/accuracies")


DROPOUT: Any = dataclasses.field(default=True, metadata={"help": "Switch off dropout in the model and the adapter."})
"""The field ``disable_dropout``."""


def curves(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_log_probs: Tensor, rejected_log_probs: Tensor
) -> dict[str, Tensor]:
    """The curves of an objective with pairs, with the names of TRL's logs.

    Args:
        chosen_rewards: the rewards of the chosen completions, (rows,).
        rejected_rewards: those of the rejected ones.
        chosen_log_probs: the log-probabilities of the chosen completions.
        rejected_log_probs: those of the rejected ones.
    """
    found = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": chosen_log_probs,
        "logps/rejected": rejected_log_probs,
    }
    return {name: values.detach() for name, values in found.items()}


def smoothed_logistic(margin: Tensor, share: float) -> Tensor:
    """The logistic loss of margins, ``-log sigmoid(margin)``, with a share of the rows taken for swapped.

    Args:
        margin: of any shape.
        share: ``label_smoothing``, from 0 to 0.5.
    """
    from torch.nn.functional import logsigmoid

    if not share:
        return -logsigmoid(margin)
    return -(1 - share) * logsigmoid(margin) - share * logsigmoid(-margin)


def check_smoothing(objective: Any, smoothed: tuple[str, ...]) -> None:
    """Checks ``beta`` and ``label_smoothing`` of an objective with a ``loss_type``.

    Args:
        objective: the objective.
        smoothed: the values of ``loss_type`` that use ``label_smoothing``.

    Raises:
        ConfigError: a value is out of range, or not used by the ``loss_type``.
    """
    share, kind = objective.label_smoothing, objective.loss_type
    if objective.beta <= 0:
        raise ConfigError(f"beta must be greater than 0, not {objective.beta!r}", field="beta")
    if share and kind not in smoothed:
        known = " and ".join(map(repr, smoothed))
        raise ConfigError(f"loss_type={kind!r} has no label_smoothing; {known} have", field="label_smoothing")
    if not 0 <= share < 0.5:
        raise ConfigError(
            f"label_smoothing must be at least 0 and less than 0.5, not {share!r}", field="label_smoothing"
        )


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
