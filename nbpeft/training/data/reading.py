"""How the rows of some data are read: their form, their columns, and what their labels mean."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.names import LOSS_WEIGHTS, MAX_LENGTH
from nbpeft.training.data.classes import Classes, names_of
from nbpeft.training.data.forms import (
    AS_CHAT,
    FOR_CLASSIFIERS,
    FORMS,
    LABELLED,
    PAIR,
    TAGGED,
    TEXT,
    TOKENISED,
    VERDICT,
    Chat,
    Compared,
    Example,
    Form,
    Prompted,
    checked_columns,
    form_of,
    keys_of,
    row_of,
)
from nbpeft.training.data.options import RowOptions
from nbpeft.training.data.row import LABEL, WEIGHT, Row, are_verdicts, is_good, is_nothing, labels_in, listed
from nbpeft.training.data.sources import first_row, is_stream, open_data

MASKS = ("completion_mask", "assistant_masks")
"""Columns of tokenized rows that mark the tokens to train on, with TRL's names."""
LABELS = ("labels", "label", "label_ids")
"""Columns of tokenized rows that may contain the labels; the first one that a row has is used."""
_TOKENS = frozenset(("input_ids", "attention_mask", LOSS_WEIGHTS, WEIGHT, *MASKS))
TOKEN_TYPES = "token_type_ids"
"""The column that marks the second of two texts."""
_COMPLETION = ("completion", "output")
"""The columns of completions."""
_NAMED = 20
"""The greatest number of classes whose names are listed."""


@dataclass(frozen=True)
class ModelInputs:
    """The inputs that a model takes from rows.

    Attributes:
        encoder_decoder: whether the prompt goes to the encoder and the completion to the decoder.
        classes: its classes, if it is a classifier of texts or tokens.
        numbers: optional columns with whole numbers that it takes in addition to tokens and labels: ``task_ids``.
        columns: columns of tokenized rows that it takes in addition to tokens and labels; None for all.
        unweighted: why rows cannot have different weights in the loss; empty if they can.
        tokens_only: why it takes no rows of text; empty if it does.
        kind: the kind of rows that the objective of a training takes, see ``FORMS_OF``; None for any.
        main: its main input, such as ``pixel_values``; rows with it are taken as they are. None if all other rows than
            texts are, for a collator of the user's.
        labels_needed: whether rows of a classifier of tokens need labels; else it takes rows for language models, too.
    """

    encoder_decoder: bool = False
    classes: Classes | None = None
    numbers: tuple[str, ...] = ()
    columns: frozenset[str] | None = frozenset(("position_ids", TOKEN_TYPES))
    unweighted: str = ""
    tokens_only: str = ""
    kind: str | None = ""
    main: str | None = TOKENISED
    labels_needed: bool = True

    @property
    def has_class(self) -> bool:
        """Whether a row has one label, for a classifier of texts."""
        return self.classes is not None and not self.classes.per_token

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of rows that the model takes, if ``kind`` says nothing else."""
        if self.classes is None:
            return FORMS
        if self.has_class:
            return (LABELLED,)
        return (TAGGED,) if self.labels_needed else (TAGGED, *FORMS)


@dataclass(frozen=True)
class Reading:
    """Opened data, and how to read and tokenize its rows.

    Attributes:
        rows: the opened data.
        form: the form of the rows; None if they are tokenized.
        columns: name in the form -> column, where they differ.
        tokenizer: the tokenizer of the model.
        limit: greatest number of tokens of a row; the rest is cut off.
        inputs: the inputs of the model.
        class_names: the dataset's names for labels that are numbers, if it has them.
        skip_bad: whether to leave out rows that cannot be read; None if that cannot be requested.
        options: how rows are read otherwise.
        group: the column by which rows are grouped for evaluation; empty if there is none.
        note: a line about the names of classes that come from the rows; empty if none do.
        numbered: the column with completions that are whole numbers, which are read as text; empty if there is none.
        names: the dataset's names for these numbers, which are read instead, if it has them.
    """

    rows: Any
    form: Form | None
    columns: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Any = None
    limit: int = MAX_LENGTH
    inputs: ModelInputs = field(default_factory=ModelInputs)
    class_names: tuple[str, ...] = ()
    skip_bad: bool | None = None
    options: RowOptions = field(default_factory=RowOptions)
    group: str = ""
    note: str = ""
    numbered: str = ""
    names: tuple[str, ...] = ()

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return has_template(self.tokenizer) and not self.inputs.encoder_decoder

    @property
    def for_template(self) -> dict[str, str]:
        """The columns with which the chat template is applied to prompts and completions that are plain text."""
        if self.form is not PAIR or not self.has_template:
            return {}
        return {name: self.columns.get(other, other) for name, other in AS_CHAT.items()}

    @property
    def used(self) -> frozenset[str]:
        """The columns that are read."""
        names = () if self.form is None else (*self.form.needs, *self.form.may, *self.inputs.numbers)
        return frozenset(self.columns.get(name, name) for name in names) | ({self.group} if self.group else set())

    def example(self, value: Any, number: int) -> Example:
        """The example of a row, before tokenization.

        Args:
            value: the row.
            number: its number, 0 for the first.

        Raises:
            TrainingError: it does not have the form of the first row; names the row.
        """
        return self.read(self.row(value, number))

    def row(self, value: Any, number: int) -> Row:
        """A row by the names of its form; completions that are whole numbers are text.

        Args:
            value: the row.
            number: its number, 0 for the first.

        Raises:
            TrainingError: it is not a row, or its number has no name, unlike others; names it.
        """
        row = row_of(value, number, self.columns)
        given = _plain(row.values.get(self.numbered))
        if type(given) is not int:
            return row
        if self.names and not 0 <= given < len(self.names):
            raise row.error(f"{self.numbered!r} is {given}, which has no name; 0 to {len(self.names) - 1} have one.")
        text = self.names[given] if self.names else str(given)
        return replace(row, values={**row.values, self.numbered: text})

    def with_names(self) -> Reading:
        """The same, with the names of the labels of these rows as those of classes without names.

        Raises:
            TrainingError: there are more or fewer names than classes.
        """
        classes = self.inputs.classes
        if classes is None or self.form not in FOR_CLASSIFIERS or is_stream(self.rows):
            return self
        name = self.form.needs[-1]
        given = labels_in(self.rows, self.columns.get(name, name))
        labels = (label for labels in given for label in as_list(labels)) if classes.per_token else given
        try:
            named = classes.named(labels, self.class_names)
        except ValueError as error:
            raise TrainingError(f"{error}.") from None
        if named is classes:
            return self
        note = f"the classes get the names of the labels: {_enumerated(named.by_number)}"
        return replace(self, inputs=replace(self.inputs, classes=named), note=note)

    def with_numbers(self, first: Any) -> Reading:
        """The same; if the completion of the first row is a whole number, those of all rows are read as text.

        Args:
            first: the first row; None if it is unknown.
        """
        name = "" if self.form is None else self.form.needs[-1]
        column = self.columns.get(name, name)
        if name not in _COMPLETION or not isinstance(first, Mapping) or type(_plain(first.get(column))) is not int:
            return self
        names = _class_names(self.rows, {}, column)
        what = f"their names: {_enumerated(names)}" if names else "text"
        return replace(self, numbered=column, names=names, note=f"the numbers in {column!r} are read as {what}")

    def check_options(self) -> None:
        """Refuses options that have no effect on these rows.

        Raises:
            ConfigError: an option would have no effect, or the chat template has no such variable.
        """
        example = None
        with contextlib.suppress(TrainingError):  # a row that cannot be read, which is reported with the others
            example = None if self.form is None else self.example(first_row(self.rows), 0)
        self.options.check(self.form, example, str(getattr(self.tokenizer, "chat_template", "") or ""))

    def read(self, row: Row) -> Example:
        """The example of a row that has the names of its form, with the options applied."""
        assert self.form is not None
        return self.options.applied(self.form.read(row, self.has_template))

    def verdict(self, row: Row) -> bool | None:
        """Whether the label of a row marks its completion as good; None for an empty cell.

        Raises:
            TrainingError: the label has another meaning.
        """
        label = row.value(LABEL)
        good = None if is_nothing(label) else is_good(self._named(label))
        if good is None and not is_nothing(label):
            column = self.columns.get(LABEL, LABEL)
            raise row.error(
                f"{column!r} is {label!r:.40}; expected True or False, 1 or 0, 1 or -1, or 'good' or 'bad'."
            )
        return good

    @property
    def is_judged(self) -> bool:
        """Whether all rows have labels that mark completions as good or bad, and at least one is bad."""
        column = self._verdict_column
        if self.form is not PAIR or is_stream(self.rows) or column not in columns_of(self.rows):
            return False
        bad = any(is_good(self._named(label)) is False for label in labels_in(self.rows, column))
        return bad and self._labels_are_verdicts

    def is_bad(self, row: Row) -> bool:
        """Whether the label of a row marks its completion as bad, as in preference data.

        Labels of rows with one text, and labels that are classes, have another meaning.

        Args:
            row: the row.
        """
        label = row.values.get(self._verdict_column)
        if self.form in (*FOR_CLASSIFIERS, TEXT) or is_nothing(label) or is_good(self._named(label)) is not False:
            return False
        return self._labels_are_verdicts

    def check_good(self, row: Row) -> None:
        """Refuses a row with a bad completion, unless the objective learns from it.

        Raises:
            TrainingError: the label marks the completion as bad.
        """
        column = self.columns.get(LABEL, LABEL)
        label = row.values.get(column)
        if self.form is not VERDICT and self.is_bad(row):
            named = self._named(label)
            name = "" if named is label else f" ({named})"
            raise row.error(
                f"{column!r} is {label!r:.40}{name}: True and False, 1 and 0, 1 and -1 or 'good' and 'bad' mark good "
                "and bad completions for preference tuning (objective='kto'); here a model is trained on every "
                "completion: remove the rows with bad ones, or the column if it means something else."
            )

    @property
    def _verdict_column(self) -> str:
        """The column whose labels may mark completions as good or bad; empty if it is read as something else."""
        column = self.columns.get(LABEL, LABEL)
        others = (other for name, other in self.columns.items() if name != LABEL)
        return "" if column in others else column

    @functools.cached_property
    def _labels_are_verdicts(self) -> bool:
        """Whether all labels in the column mark completions as good or bad; assumed for a stream, which is not read."""
        column = self.columns.get(LABEL, LABEL)
        return is_stream(self.rows) or are_verdicts(map(self._named, labels_in(self.rows, column)))

    def named_label(self, label: Any) -> Any:
        """A label as it is read: its name, if it is a number for which the dataset has one that is used."""
        classes = self.inputs.classes
        named = self.form is VERDICT or (classes is not None and classes.names.keys() >= {*self.class_names})
        return self._named(label) if named else label

    def _named(self, label: Any) -> Any:
        """The name of a label that is a number, if the dataset has names for them; else the label itself."""
        counted = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.class_names)
        return self.class_names[label] if counted else label

    def extra(self, columns: Sequence[str] | Mapping[str, Any]) -> list[str]:
        """The columns of tokenized rows that are not used.

        Args:
            columns: all columns.
        """
        taken, names = self.inputs.columns, {column: name for name, column in self.columns.items()}
        label = next((name for name in LABELS if self.columns.get(name, name) in columns), "labels")
        known = _TOKENS - frozenset(MASKS if self.inputs.has_class else ()) | {label} | (taken or set())
        renamed_to = [names.get(column, None if column in self.columns else column) for column in columns]
        return [
            column
            for column, name in zip(columns, renamed_to, strict=True)
            if name is None or (taken is not None and name not in known)
        ]

    def kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a tokenized row for the model other than tokens and labels."""
        taken = self.inputs.columns
        left = _TOKENS - {"attention_mask"} | {*LABELS, *self.columns.values()}
        return {
            name: value
            for name, value in values.items()
            if name not in left and (name == "attention_mask" or taken is None or name in taken)
        }


def reading(
    rows: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    inputs: ModelInputs | None = None,
    skip_bad: bool | None = None,
    group: str | None = None,
    **how: Any,
) -> Reading:
    """How opened rows are read; see :func:`prepare_data`.

    Raises:
        ConfigError: an option is invalid, or has no effect on these rows.
        TrainingError: the rows have no known form, or a tokenizer is needed and missing.
    """
    inputs, options = inputs or ModelInputs(), RowOptions(**how)
    available = columns_of(rows)
    mapping = checked_columns(columns, available)
    first = None if is_stream(rows) or not len(rows) else first_row(rows)
    chat = has_template(tokenizer) and not inputs.encoder_decoder
    kinds: dict[str, Any] = {"usual": inputs.forms, "kind": inputs.kind, "main": inputs.main}
    form = form_of(available, columns or {}, first=first, chat=chat, **kinds)
    if inputs.main is None and TOKENISED not in available:
        inputs = replace(inputs, columns=None)
    if inputs.tokens_only and (form is not None or {*available, *mapping}.isdisjoint((*LABELS, "start_positions"))):
        raise TrainingError(f"{inputs.tokens_only}; found {listed(available)}.", columns=available)
    if form is None and max_length is not None and TOKENISED not in (*available, *mapping):
        raise ConfigError("max_length has no effect: these rows have no tokens to cut", field="max_length")
    common: dict[str, Any] = {"skip_bad": skip_bad, "options": options, "group": group or ""}
    if form is None:
        found = Reading(rows, None, mapping, tokenizer, inputs=inputs, **common)
        found.check_options()
        return found
    if tokenizer is None:
        raise TrainingError(f"Rows with {form.name} need a tokenizer (tokenizer=…)", columns=available)
    inputs = replace(inputs, numbers=tuple(name for name in inputs.numbers if name in available))
    names = _class_names(rows, mapping, form.needs[-1] if form is TAGGED else LABEL)
    limit = max_length or default_length(tokenizer)
    found = Reading(rows, form, mapping, tokenizer, limit, inputs, names, **common)
    found = found.with_numbers(first)
    if inputs.kind is None and found.is_judged:
        found = replace(found, form=VERDICT)
    found = found.with_names()
    if options != RowOptions():
        found.check_options()
    return found


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def are_judged(rows: Any, columns: Mapping[str, str]) -> bool:
    """Whether rows with prompts and completions have labels that mark completions as good or bad.

    Args:
        rows: opened rows.
        columns: name in the form -> column, where they differ.
    """
    return Reading(rows, PAIR, columns, class_names=_class_names(rows, columns)).is_judged


def _class_names(rows: Any, columns: Mapping[str, str], name: str = LABEL) -> tuple[str, ...]:
    """The names of labels that are numbers; empty if the dataset has none."""
    return names_of((getattr(rows, "features", None) or {}).get(columns.get(name, name)))


def default_length(tokenizer: Any) -> int:
    """The default of ``max_length``, in tokens: the tokenizer's limit, at most 1024."""
    return min(int(getattr(tokenizer, "model_max_length", MAX_LENGTH)), MAX_LENGTH)


def columns_of(rows: Any) -> tuple[str, ...]:
    """Names of the columns of opened rows.

    Raises:
        TrainingError: the data has no named columns, or is empty.
    """
    names = getattr(rows, "column_names", None)
    return tuple(map(str, names)) if names is not None else keys_of(first_row(rows))


def is_plain(data: Any, tokenizer: Any = None, columns: Mapping[str, str] | None = None) -> bool | None:
    """Whether rows are text to which no chat template is applied; None for rows that are tokenized already.

    Args:
        data: as for :func:`prepare_data`.
        tokenizer: the tokenizer; its chat template, if any, is applied to rows with an instruction.
        columns: as for :func:`prepare_data`.

    Raises:
        TrainingError: the rows have no known form.
    """
    rows = open_data(data)
    found = columns_of(rows)
    reader = Reading(rows, form_of(found, columns or {}, kind=None), checked_columns(columns, found), tokenizer)
    if reader.form is None:
        return None
    first = first_row(rows)
    example = reader.with_numbers(first).example(first, 0)
    if isinstance(example, Prompted):
        return isinstance(example.prompt, str)
    return not isinstance(example.chosen if isinstance(example, Compared) else example, Chat)


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A tokenized row with the names that models take.

    Args:
        row: the row.
        columns: name that models take -> column, where they differ.
    """
    return {**row, **{name: row[column] for name, column in columns.items()}}


def _enumerated(names: Sequence[str]) -> str:
    """The names of classes with their numbers."""
    known = ", ".join(f"{number} = {name}" for number, name in enumerate(names[:_NAMED]))
    return f"{known} and {len(names) - _NAMED} more" if len(names) > _NAMED else known


def _plain(value: Any) -> Any:
    """A value of a table as one of Python."""
    return value.item() if getattr(value, "shape", None) == () else value


def as_list(value: Any) -> list[Any]:
    """Numbers of a row as a list; an empty list for a single number, such as a class."""
    numbers = value.tolist() if hasattr(value, "tolist") else value
    return list(numbers) if isinstance(numbers, (list, tuple)) else []
