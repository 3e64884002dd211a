"""The arguments of one training as one value, which is passed from the session to the training process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Self

from torch import nn
from transformers import TrainingArguments

from nbpeft._util.former_names import refuse_former_names
from nbpeft.errors import check_bool
from nbpeft.names import DEFAULT_SEED, ROW_OPTIONS
from nbpeft.runs.store import RunPlace
from nbpeft.state import TrainState
from nbpeft.training.data import columns_of, is_amount, open_data, separator_for
from nbpeft.training.monitor.control import RunControl
from nbpeft.training.monitor.run import Run
from nbpeft.training.objectives.objective import Objective
from nbpeft.training.transformers.trainer import Trainer
from nbpeft.training.watching.generation import Prompt
from nbpeft.training.watching.prompts import SamplePrompts

_NO_KEYWORDS = ("model", "data", "eval_data", "arguments", "is_open", "objective_reason", "rate_reason", "first_random")
NOT_KEPT = frozenset(
    {
        *("model", "data", "tokenizer", "data_hint", "adapter", "control", "publish", "run_factory", "run_dir"),
        *("members", "replace", "arguments", "is_open", "objective_reason", "rate_reason", "first_random"),
    }
)
"""Fields that the record of a run does not store: data and tokenizer are given again, the others belong to the call."""


GIVEN_AGAIN = object()
"""What the record of a run has for rows that a resumed run has to be given again: nothing that a file can hold."""


@dataclass(frozen=True, eq=False, repr=False)
class TrainRequest:
    """The arguments of :func:`nbpeft.train`, which documents them, as one value.

    Attributes:
        members: adapters to train side by side, as given; a :class:`SideBySide` during training.
        sample: prompts to answer; tokenized for training processes.
        score: rows to score, or where they are; only their presence is stored with a run.
        arguments: fields of the arguments class and options of the Trainer.
        data: training rows, or where they are; adapter -> its own, if ``members`` are trained on rows of their own.
        eval_data: the same for evaluation, or how many rows of ``data`` to hold out.
        is_open: whether ``data`` and ``eval_data`` are rows, and not their sources.
        objective: its name as given; an :class:`Objective` during training.
        reward: reward functions, as given; a :class:`Rewards` during training.
        objective_reason: why the objective was chosen, if it was not given.
        rate_reason: the default learning rate, and what it follows from, or why a given one is unused; else empty.
        first_random: random state, or seed, from which the adapters of a sweep get initial weights; None for copies of
            the adapter from which it starts.
    """

    model: nn.Module
    data: Any
    eval_data: Any = None
    _: KW_ONLY
    tokenizer: Any = None
    max_length: int | None = None
    columns: Mapping[str, str] | None = None
    separator: str | None = None
    skip_bad: bool | None = False
    learn: str = "all"
    reasoning: str = "keep"
    long: str = "cut"
    chat_template_kwargs: Mapping[str, Any] | None = None
    eval_by: str | None = None
    data_hint: str = ""
    adapter: str | None = None
    patience: int | None = None
    sample: str | Sequence[Prompt] | int | SamplePrompts | None = None
    every: int | None = None
    score: Any = None
    metric: Any = None
    max_score_rows: int | None = None
    max_new_tokens: int | None = None
    packing: bool = False
    control: RunControl | None = None
    publish: Callable[[TrainState], None] | None = None
    run_factory: Callable[..., Run] = Run
    trainer_class: type[Any] = Trainer
    arguments_class: type[TrainingArguments] = TrainingArguments
    run_dir: RunPlace | str | os.PathLike[str] | None = None
    track: str | Sequence[str] | None = None
    members: Any = None
    halving: bool = False
    stop_on_divergence: bool = True
    processes: int | None = None
    hosts: Sequence[str] | None = None
    replace: bool = False
    objective: str | Objective | None = None
    reference: str | None = None
    reward: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_open: bool = False
    objective_reason: str = ""
    rate_reason: str = ""
    first_random: Any = None

    @classmethod
    def of(cls, model: nn.Module, data: Any, eval_data: Any = None, **keywords: Any) -> Self:
        """Creates the request for the arguments of ``train``.

        Args:
            model: the model to train.
            data: training rows, or where they are.
            eval_data: evaluation rows, or where they are, or how many to hold out.
            **keywords: keyword arguments of ``train``, including those of the arguments class and the Trainer.

        Raises:
            ConfigError: one that must be True or False is something else, or one has another name now.
        """
        refuse_former_names(cls, keywords, "train")
        for item in fields(cls):
            if isinstance(item.default, bool) and item.name in keywords:
                check_bool(item.name, keywords[item.name])
        own = {item.name for item in fields(cls)}.difference(_NO_KEYWORDS)
        rest = {name: value for name, value in keywords.items() if name not in own}
        known = {name: value for name, value in keywords.items() if name in own}
        return cls(model, data, eval_data, **known, arguments=rest)

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments that differ from their defaults, and all of ``arguments``."""
        own = {item.name: item.default for item in fields(self) if item.name not in _NO_KEYWORDS}
        changed = {name: getattr(self, name) for name, usual in own.items() if getattr(self, name) is not usual}
        return changed | dict(self.arguments)

    @property
    def seed(self) -> int:
        """Seed for held-out rows and new adapters; by default that of ``TrainingArguments``."""
        seed = self.arguments.get("seed")
        return seed if isinstance(seed, int) else DEFAULT_SEED

    @property
    def reading(self) -> dict[str, Any]:
        """How the rows are read: arguments of :func:`nbpeft.training.data.reading.reading`."""
        names = ("max_length", "columns", "skip_bad", *ROW_OPTIONS)
        return {"group": self.eval_by, **{name: getattr(self, name) for name in names}}

    @property
    def own_rows(self) -> tuple[str, ...]:
        """The adapters with rows of their own; empty if all are trained on the same rows."""
        names = getattr(self.members, "names", self.members)
        own = isinstance(self.data, Mapping) and isinstance(names, Mapping | tuple) and {*self.data} == {*names}
        return tuple(self.data) if own else ()

    def of_adapter(self, name: str) -> Self:
        """Returns the request with the rows of one of ``own_rows``.

        Columns that other rows have and these do not have, not even one of them, are left out of an open request.
        """
        measured = self.eval_data[name] if isinstance(self.eval_data, Mapping) else self.eval_data
        columns = None if name in self.unmapped else self.columns
        return replace(self, data=self.data[name], eval_data=measured, columns=columns)

    @property
    def unmapped(self) -> tuple[str, ...]:
        """The ``own_rows`` that have none of the mapped columns, while others have all; empty before they are open."""
        if not (self.is_open and self.own_rows and isinstance(self.columns, Mapping)):
            return ()
        wanted, found = {*self.columns.values()}, {name: {*columns_of(rows)} for name, rows in self.data.items()}
        if not any(wanted <= columns for columns in found.values()):
            return ()
        return tuple(name for name, columns in found.items() if wanted.isdisjoint(columns))

    def opened(self) -> Self:
        """Returns the request with its data opened as rows; itself if it is already open.

        Raises:
            TrainingError: the data cannot be read, or has no rows.
        """
        if self.is_open:
            return self
        own, data, measured = self.own_rows, self.data, self.eval_data
        rows = {name: self._opened_rows(part) for name, part in data.items()} if own else self._opened_rows(data)
        if own and isinstance(measured, Mapping):
            measured = {name: self._opened_evaluation(part) for name, part in measured.items()}
        else:
            measured = self._opened_evaluation(measured)
        return replace(self, data=rows, eval_data=measured, is_open=True)

    def _opened_rows(self, data: Any) -> Any:
        return open_data(data, self.separator, skip_bad=self.skip_bad, seed=self.seed)

    def _opened_evaluation(self, data: Any) -> Any:
        if data is None or is_amount(data):
            return data
        return open_data(data, separator_for(data, self.separator), skip_bad=self.skip_bad, seed=self.seed)

    def kept(self) -> dict[str, Any]:
        """Returns what the record of a run stores in addition to ``arguments``: changed keyword arguments, no rows."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["trainer_class"] = getattr(self.trainer_class, "given_class", self.trainer_class)  # of a sweep
        if self.score is not None:
            values["score"] = GIVEN_AGAIN
        if isinstance(self.sample, SamplePrompts):
            values["sample"] = self.sample.given
        values["reward"] = getattr(self.reward, "functions", self.reward)
        if not is_amount(self.eval_data):
            values["eval_data"] = None
        own = {item.name: item.default for item in fields(self) if item.name not in NOT_KEPT}
        if isinstance(self.objective, Objective):  # with its fields, which are arguments of a training too
            values["objective"] = self.objective.name if self.objective.rows else None
            values["trainer_class"] = own["trainer_class"] if self.objective.rows else values["trainer_class"]
            values |= self.objective.changed()
            own |= dict.fromkeys(self.objective.changed())
        return {name: values[name] for name, usual in own.items() if values[name] is not usual}
