"""How the rows of some data are read: each becomes the tokens and labels that a model is trained on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbpeft.errors import TrainingError, in_one_line
from nbpeft.names import IGNORED_LABEL, LOSS_WEIGHTS
from nbpeft.training.data.chats import ChatRenderer
from nbpeft.training.data.classes import Classes
from nbpeft.training.data.encoding import Encoded, Span, encode
from nbpeft.training.data.forms import (
    LABELLED,
    TEXT,
    Chat,
    Example,
    Form,
    Labelled,
    Pair,
    check_roles,
    checked_columns,
    form_of,
    keys_of,
    row_of,
)
from nbpeft.training.data.row import WEIGHT, Row, is_nothing, listed
from nbpeft.training.data.sources import first_row, is_stream, open_data
from nbpeft.training.data.unused import COLUMNS, EMPTY, MESSAGES, UNPRINTED, Unused
from nbpeft.training.data.verdicts import LABEL, are_verdicts, is_good, labels_in

DEFAULT_MAX_LENGTH = 1024
MASKS = ("completion_mask", "assistant_masks")
"""Columns of tokenised rows that say of each token whether it is learned, as TRL has them."""
LABELS = ("labels", "label", "label_ids")
"""Columns of tokenised rows that a model gets as its labels: the first of them that a row has."""
_TOKENS = frozenset(("input_ids", "attention_mask", LOSS_WEIGHTS, WEIGHT, *MASKS))
_SECOND = "token_type_ids"


@dataclass(frozen=True)
class ModelInputs:
    """What a model takes of rows.

    Attributes:
        encoder_decoder: whether prompt and completion go to different halves of it.
        classes: that it tells apart, if it is a classifier of texts.
        numbers: columns whose whole numbers it takes beside tokens and labels, where rows have them: ``task_ids``.
        columns: of tokenised rows that it takes beside tokens and labels; None for all.
        unweighted: why a loss cannot count more for one row than for another; empty if it can.
        tokens_only: why it takes no rows of text; empty if it does.
    """

    encoder_decoder: bool = False
    classes: Classes | None = None
    numbers: tuple[str, ...] = ()
    columns: frozenset[str] | None = frozenset(("position_ids", _SECOND))
    unweighted: str = ""
    tokens_only: str = ""


@dataclass(frozen=True)
class CodedRow:
    """One tokenised row, before what is too long is cut off.

    Attributes:
        number: 0 for the first.
        whole: All of it.
        limit: Tokens it is cut to.
        encoder_decoder: Whether the labels stand for themselves, and not beside the ids.
        reason: Why nothing is learned from it, if that is known before it is cut.
        label: What a classifier is to say of it; None of a row whose tokens are learned.
        more: What the row holds beside tokens and labels, by column; tokens of a classifier's row that are not cut
            off at the end are among it.
        weight: How much the loss on the label counts.
        unused: What of the row is not trained on.
    """

    number: int
    whole: Encoded
    limit: int
    encoder_decoder: bool = False
    reason: str = ""
    label: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    unused: tuple[Unused, ...] = ()

    @property
    def row(self) -> dict[str, Any]:
        """What a model is trained on."""
        ids, labels, weights = self.whole.input_ids[: self.limit], self.whole.labels[: self.limit], self.whole.weights
        if self.label is not None:
            weighted = {LOSS_WEIGHTS: self.weight} if self.weight != 1 else {}
            return {"input_ids": ids, "labels": self.label, **self.more, **weighted}
        if weights is None:
            return {"input_ids": ids, "labels": labels, **self.more}
        return {"input_ids": ids, "labels": labels, **self.more, LOSS_WEIGHTS: weights[: self.limit]}

    @property
    def cut(self) -> bool:
        """Whether it is too long."""
        return len(self.whole.input_ids) > self.limit or len(self.whole.labels) > self.limit

    @property
    def learned_count(self) -> int:
        """How many labels a loss is taken on."""
        return 1 if self.label is not None else count_learned(self.row["labels"], self.encoder_decoder)

    @property
    def missing(self) -> str:
        """Why nothing is learned from it; empty if something is."""
        if self.reason or self.learned_count:
            return self.reason
        return f"nothing to learn within {self.limit} tokens" if self.cut else "nothing to learn"


@dataclass(frozen=True)
class Reading:
    """How the rows of some data are read and tokenised.

    Attributes:
        rows: the opened data.
        form: of the rows, or None where they are tokenised.
        columns: name in the form -> column, where they differ.
        tokenizer: of the model.
        limit: tokens a row is cut to.
        inputs: what the model takes.
        class_names: of the numbers that a dataset has as labels, if it names them.
    """

    rows: Any
    form: Form | None
    columns: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Any = None
    limit: int = DEFAULT_MAX_LENGTH
    inputs: ModelInputs = field(default_factory=ModelInputs)
    class_names: tuple[str, ...] = ()

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return bool(getattr(self.tokenizer, "chat_template", None)) and not self.inputs.encoder_decoder

    @property
    def used(self) -> frozenset[str]:
        """The columns that are read."""
        names = () if self.form is None else (*self.form.needs, *self.form.may, *self.inputs.numbers)
        return frozenset(self.columns.get(name, name) for name in names)

    def example(self, value: Any, number: int) -> Example:
        """What a row says.

        Raises:
            TrainingError: it has not the form of the first row; names it.
        """
        assert self.form is not None
        return self.form.read(row_of(value, number, self.columns), self.has_template)

    def coded(self) -> Iterator[CodedRow]:
        """The rows, tokenised one after the other; those that are tokens already with their masks and weights.

        Raises:
            TrainingError: a row cannot be read; names it.
        """
        renderer, used = ChatRenderer(self.tokenizer), self.used
        for number, value in enumerate(self.rows):
            row = row_of(value, number, self.columns)
            coded = self._as_it_is(row) if self.form is None else self._coded(row, renderer, used)
            weighted = coded.whole.weights is not None or coded.weight != 1
            if weighted and self.inputs.unweighted and not coded.missing:
                raise row.error(f"its weight is neither 0 nor 1, and {self.inputs.unweighted}.")
            yield coded

    def _coded(self, row: Row, renderer: ChatRenderer, used: frozenset[str]) -> CodedRow:
        assert self.form is not None
        example = self.form.read(row, self.has_template)
        columns = [name for name, value in row.values.items() if name not in used and not is_nothing(value)]
        unused = [(COLUMNS, repr(name)) for name in columns]
        for name in columns:
            row.check_unused(name)
        self._check_good(row)
        weight = row.weight()
        more = {name: row.whole_number(name) for name in self.inputs.numbers}
        if isinstance(example, Labelled):
            return self._labelled(row, example, more, weight, tuple(unused))
        read = (self.columns.get(name, name) for name in self.form.needs[:-1])  # and not learned
        unused += [(EMPTY, repr(column)) for column in read if is_nothing(row.values[column])]
        whole, reason, also = self._encoded(row, example, renderer)
        whole, reason = whole.weighted(weight or 1.0), reason if weight else "its weight is 0"
        apart = self.inputs.encoder_decoder
        return CodedRow(row.number, whole, self.limit, apart, reason, None, more, unused=(*unused, *also))

    def _check_good(self, row: Row) -> None:
        """Refuses a row with a bad completion; labels beside a text say something else, and so do those of classes.

        Raises:
            TrainingError: its label says that the completion is a bad one.
        """
        column = self.columns.get(LABEL, LABEL)
        label = row.values.get(column)
        if self.form is LABELLED or self.form is TEXT or is_nothing(label) or is_good(self._named(label)) is not False:
            return
        if self._labels_are_verdicts:
            named = self._named(label)
            name = "" if named is label else f" ({named})"
            raise row.error(
                f"{column!r} is {label!r:.40}{name}: True and False, 1 and 0, 1 and -1 or 'good' and 'bad' say which "
                "completions are good, for preference tuning (KTO); here every completion is learned as a good one: "
                "leave out the rows with bad ones, or remove the column if it says something else."
            )

    @functools.cached_property
    def _labels_are_verdicts(self) -> bool:
        """Whether no label in the column is of a class; of a stream, whose rows are not known, it is taken to be so."""
        column = self.columns.get(LABEL, LABEL)
        return is_stream(self.rows) or are_verdicts(map(self._named, labels_in(self.rows, column)))

    def _named(self, label: Any) -> Any:
        """The name of a label that is a number, where the dataset has names for them."""
        counted = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.class_names)
        return self.class_names[label] if counted else label

    def _encoded(self, row: Row, example: Example, renderer: ChatRenderer) -> tuple[Encoded, str, list[Unused]]:
        """A row tokenised, why nothing is learned from it, and what of it is not used."""
        assert self.form is not None
        if self.inputs.encoder_decoder and not isinstance(example, Pair):
            raise TrainingError(
                f"An encoder-decoder model needs rows with prompt and completion, found {self.form.name}."
            )
        if isinstance(example, Chat):
            return _encode_chat(example, row.number, self.tokenizer, renderer)
        if isinstance(example, Pair):
            unused = [(MESSAGES, name) for name in example.unused]
            reason = "" if example.completion.strip() else "the completion is empty"
            if self.inputs.encoder_decoder:
                ids, labels = (list(self.tokenizer(text)["input_ids"]) for text in (example.prompt, example.completion))
                return Encoded(ids, labels), reason, unused
            text = example.prompt + example.completion
            return encode(self.tokenizer, text, [Span(len(example.prompt), len(text))]), reason, unused
        assert not isinstance(example, Labelled)
        reason = "" if example.text.strip() else "the text is empty"
        return encode(self.tokenizer, example.text, [Span(0, len(example.text))], whole=True), reason, []

    def _labelled(
        self, row: Row, example: Labelled, more: Mapping[str, Any], weight: float, unused: tuple[Unused, ...]
    ) -> CodedRow:
        """A row for a classifier, which its tokenizer cuts: what ends a text stays at its end."""
        texts = [example.text] if example.pair is None else [example.text, example.pair]
        label = self._label(row, example.label, "label")
        reason = "the text is empty" if is_nothing(example.text) else "the label is empty" if label is None else ""
        reason = reason if weight else "its weight is 0"
        whole = self.tokenizer(*texts)
        ids = list(whole["input_ids"])
        read = whole if len(ids) <= self.limit else self.tokenizer(*texts, truncation=True, max_length=self.limit)
        columns = (_SECOND,) if self.inputs.columns is None or _SECOND in self.inputs.columns else ()
        kept = {name: list(read[name]) for name in ("input_ids", *columns) if name in read}
        return CodedRow(
            row.number, Encoded(ids, []), self.limit, False, reason, label, {**kept, **more}, weight, unused
        )

    def _label(self, row: Row, value: Any, column: str) -> Any:
        """The label of a classifier's row.

        Raises:
            TrainingError: it is none of the classes.
        """
        classes = self.inputs.classes
        assert classes is not None
        if (
            classes.names.keys() >= {*self.class_names}
            and isinstance(value, int)
            and 0 <= value < len(self.class_names)
        ):
            value = self.class_names[value]  # a dataset may count the same classes in another order
        try:
            return classes.label(value)
        except ValueError as error:
            raise row.error(f"{self.columns.get(column, column)!r} is {value!r:.40}; {error}.") from None

    def _as_it_is(self, row: Row) -> CodedRow:
        """A tokenised row; the batches copy labels from the ids where a row has none."""
        values = renamed(row.values, self.columns)
        ids = _listed(values.get("input_ids", ()))
        name = next((name for name in LABELS if values.get(name) is not None), None)
        given = None if name is None else values[name]
        weight = row.weight()
        reason = "" if weight else "its weight is 0"
        unused = tuple((COLUMNS, repr(name)) for name in self.extra(row.values))
        more = self._kept(values)
        if self.inputs.classes is not None:
            label, weight = self._label(row, given, name or "labels"), weight * row.weight(LOSS_WEIGHTS)
            reason = reason or ("the label is empty" if label is None else "")
            return CodedRow(row.number, Encoded(ids, []), len(ids), False, reason, label, more, weight, unused)
        seen = _listed(values.get("attention_mask", [1] * len(ids)))
        copied = [token if seen else IGNORED_LABEL for token, seen in zip(ids, seen, strict=False)]
        labels = copied if given is None else _listed(given)
        labels, weights = self._masked(row, values, labels)
        whole = Encoded(ids, labels, weights).weighted(weight or 1.0)
        limit, apart = max(len(ids), len(labels)), self.inputs.encoder_decoder
        return CodedRow(row.number, whole, limit, apart, reason, None, more, unused=unused)

    def _masked(self, row: Row, values: Mapping[str, Any], labels: list[int]) -> tuple[list[int], list[float] | None]:
        """Labels where all masks of a row let them be, and their weights.

        Raises:
            TrainingError: a mask is longer or shorter than the labels, or a weight is below 0.
        """
        weights = None
        for name in (*MASKS, LOSS_WEIGHTS):
            if values.get(name) is None:
                continue
            factors = _listed(values[name])
            if len(factors) != len(labels):
                raise row.error(f"{name!r} has {len(factors)} numbers for {len(labels)} labels.")
            if any(not 0 <= factor < float("inf") for factor in factors):
                raise row.error(f"{name!r} holds a number that is negative or not finite.")
            labels = [label if factor else IGNORED_LABEL for label, factor in zip(labels, factors, strict=True)]
            weights = [float(factor) for factor in factors] if name == LOSS_WEIGHTS else weights
        return labels, weights

    def extra(self, columns: Sequence[str] | Mapping[str, Any]) -> list[str]:
        """Which columns of tokenised rows nothing takes.

        Args:
            columns: all of them.
        """
        taken, names = self.inputs.columns, {column: name for name, column in self.columns.items()}
        label = next((name for name in LABELS if self.columns.get(name, name) in columns), "labels")
        known = (
            _TOKENS - (frozenset() if self.inputs.classes is None else frozenset(MASKS)) | {label} | (taken or set())
        )
        renamed_to = [names.get(column, None if column in self.columns else column) for column in columns]
        return [
            column
            for column, name in zip(columns, renamed_to, strict=True)
            if name is None or (taken is not None and name not in known)
        ]

    def _kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a tokenised row holds for the model beside tokens and labels."""
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
) -> Reading:
    """How opened rows are read; see :func:`prepare_data`.

    Raises:
        TrainingError: the data has no form that can be read, or it needs a tokenizer.
    """
    inputs = inputs or ModelInputs()
    found = columns_of(rows)
    mapping = checked_columns(columns, found)
    form = form_of(found, columns or {}, labelled=inputs.classes is not None)
    if inputs.tokens_only and (form is not None or {*found, *mapping}.isdisjoint((*LABELS, "start_positions"))):
        raise TrainingError(f"{inputs.tokens_only}; found {listed(found)}.", columns=found)
    if form is None:
        return Reading(rows, None, mapping, tokenizer, inputs=inputs)
    if tokenizer is None:
        raise TrainingError(f"Rows with {form.name} need a tokenizer (tokenizer=…)", columns=found)
    inputs = replace(inputs, numbers=tuple(name for name in inputs.numbers if name in found))
    feature = (getattr(rows, "features", None) or {}).get(mapping.get("label", "label"))
    names = tuple(getattr(feature, "names", None) or ())
    return Reading(rows, form, mapping, tokenizer, max_length or default_length(tokenizer), inputs, names)


def default_length(tokenizer: Any) -> int:
    """Tokens that rows are cut to where nothing else is said."""
    return min(int(getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH)), DEFAULT_MAX_LENGTH)


def columns_of(rows: Any) -> tuple[str, ...]:
    """Names of the columns of opened rows.

    Raises:
        TrainingError: it has no named columns, or it is empty.
    """
    names = getattr(rows, "column_names", None)
    return tuple(map(str, names)) if names is not None else keys_of(first_row(rows))


def is_plain(data: Any, tokenizer: Any = None, columns: Mapping[str, str] | None = None) -> bool | None:
    """Whether rows are text that no chat template goes around; None for rows that are tokens already.

    Args:
        data: as for :func:`prepare_data`.
        tokenizer: its chat template goes around rows with an instruction.
        columns: as for :func:`prepare_data`.

    Raises:
        TrainingError: the data has no form that can be trained on.
    """
    return rows_are_plain(open_data(data), tokenizer, columns)


def rows_are_plain(rows: Any, tokenizer: Any, columns: Mapping[str, str] | None) -> bool | None:
    """As :func:`is_plain`, of opened rows."""
    found = columns_of(rows)
    how = Reading(rows, form_of(found, columns or {}), checked_columns(columns, found), tokenizer)
    return None if how.form is None else not isinstance(how.example(first_row(rows), 0), Chat)


def count_learned(labels: Sequence[int], encoder_decoder: bool = False) -> int:
    """How many tokens a loss is taken on: a decoder does not predict the first one."""
    return sum(label != IGNORED_LABEL for label in (labels if encoder_decoder else labels[1:]))


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A tokenised row with the names that models know."""
    return {**row, **{name: row[column] for name, column in columns.items()}}


def _encode_chat(chat: Chat, number: int, tokenizer: Any, renderer: ChatRenderer) -> tuple[Encoded, str, list[Unused]]:
    check_roles(number, chat, str(getattr(tokenizer, "chat_template", "") or ""))
    try:
        rendered = renderer.render(chat)
    except TrainingError as error:
        if not getattr(tokenizer, "chat_template", None):  # no row can be rendered
            raise
        raise TrainingError(f"Row {number}: {error}", index=number) from None
    except Exception as error:  # a template runs code of its own, and has ways to refuse a chat
        raise TrainingError(
            f"Row {number}: the chat template refuses it: {in_one_line(error) or type(error).__name__}", index=number
        ) from None
    unused = [(MESSAGES, name) for name in chat.unused] + [(UNPRINTED, name) for name in rendered.left_out]
    return encode(tokenizer, rendered.text, rendered.spans, special=False), rendered.missing, unused


def _listed(value: Any) -> list[Any]:
    """Numbers of a row as a list; none for a single one, such as a class."""
    found = value.tolist() if hasattr(value, "tolist") else value
    return list(found) if isinstance(found, (list, tuple)) else []
