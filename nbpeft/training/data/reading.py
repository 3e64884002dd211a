"""Reads rows: each becomes the tokens and labels on which a model is trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from nbpeft.errors import TrainingError, in_one_line
from nbpeft.names import DESIRABLE, IGNORED_LABEL, LOSS_WEIGHTS
from nbpeft.training.data.bad_rows import GIVE_UP, reason_of, refusal
from nbpeft.training.data.chats import ChatRenderer
from nbpeft.training.data.classes import Classes, names_of
from nbpeft.training.data.encoding import CodedRow, Encoded, Span, encode
from nbpeft.training.data.forms import (
    AS_CHAT,
    FOR_CLASSIFIERS,
    FORMS,
    LABELLED,
    MARGIN,
    PAIR,
    TAGGED,
    TEMPLATE,
    TEXT,
    VERDICT,
    Chat,
    Compared,
    Example,
    Form,
    Labelled,
    Pair,
    Plain,
    Prompted,
    Tagged,
    check_roles,
    checked_columns,
    form_of,
    keys_of,
    row_of,
)
from nbpeft.training.data.options import MASKED_REASONING, RowOptions, why_not_used
from nbpeft.training.data.row import WEIGHT, Row, is_nothing, listed
from nbpeft.training.data.seen_formats import joint_of, system_of
from nbpeft.training.data.sources import first_row, is_stream, open_data
from nbpeft.training.data.tags import TaggedTokens, encode_words
from nbpeft.training.data.unused import COLUMNS, EMPTY, MESSAGES, UNPRINTED, UNTOKENISED, Unused
from nbpeft.training.data.verdicts import LABEL, are_verdicts, is_good, labels_in

DEFAULT_MAX_LENGTH = 1024
MASKS = ("completion_mask", "assistant_masks")
"""Columns of tokenised rows that mark the tokens to train on, with TRL's names."""
LABELS = ("labels", "label", "label_ids")
"""Columns of tokenised rows that may contain the labels; the first one that a row has is used."""
_TOKENS = frozenset(("input_ids", "attention_mask", LOSS_WEIGHTS, WEIGHT, *MASKS))
_SECOND = "token_type_ids"
_COMPLETION = ("completion", "output")
"""The columns of completions."""
_NAMED = 20
"""The greatest number of classes whose names are listed."""
Rendered = TypeVar("Rendered")


@dataclass(frozen=True)
class ModelInputs:
    """The inputs that a model takes from rows.

    Attributes:
        encoder_decoder: whether the prompt goes to the encoder and the completion to the decoder.
        classes: its classes, if it is a classifier of texts or tokens.
        numbers: optional columns with whole numbers that it takes in addition to tokens and labels: ``task_ids``.
        columns: columns of tokenised rows that it takes in addition to tokens and labels; None for all.
        unweighted: why rows cannot have different weights in the loss; empty if they can.
        tokens_only: why it takes no rows of text; empty if it does.
        kind: the kind of rows that the objective of a training takes, see ``FORMS_OF``; None for any.
        labels_needed: whether rows of a classifier of tokens need labels; else it takes rows for language models, too.
    """

    encoder_decoder: bool = False
    classes: Classes | None = None
    numbers: tuple[str, ...] = ()
    columns: frozenset[str] | None = frozenset(("position_ids", _SECOND))
    unweighted: str = ""
    tokens_only: str = ""
    kind: str | None = ""
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
    """Opened data, and how to read and tokenise its rows.

    Attributes:
        rows: the opened data.
        form: the form of the rows; None if they are tokenised.
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
    limit: int = DEFAULT_MAX_LENGTH
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
        """The example of a row, before tokenisation.

        Args:
            value: the row.
            number: its number, 0 for the first.

        Raises:
            TrainingError: it does not have the form of the first row; names the row.
        """
        return self._example(self.row(value, number))

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
        labels = (label for labels in given for label in _listed(labels)) if classes.per_token else given
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

    def _example(self, row: Row) -> Example:
        assert self.form is not None
        return self.options.applied(self.form.read(row, self.has_template))

    def coded(self) -> Iterator[CodedRow]:
        """Tokenises the rows one after the other; rows that are tokenised already get their masks and weights applied.

        Rows that cannot be read have a reason to be left out if ``skip_bad`` is set. Otherwise all rows are read to
        count them; of a stream, only up to the first.

        Raises:
            TrainingError: rows cannot be read; names them.
        """
        renderer, used, number = ChatRenderer(self.tokenizer), self.used, -1
        bad: list[tuple[int, TrainingError]] = []
        for number, value in enumerate(self.rows):
            try:
                coded = self._row(value, number, renderer, used)
            except TrainingError as error:
                if error.details.get("index") != number:  # what is wrong with all rows
                    raise
                bad.append((number, error))
                if self.skip_bad:
                    yield CodedRow(number, Encoded([], []), self.limit, reason=reason_of(error))
                elif is_stream(self.rows) or len(bad) == number + 1 == GIVE_UP:
                    break
            else:
                if self.skip_bad or not bad:
                    yield from coded.fitted(self.options.long)
        if bad and not self.skip_bad:
            raise refusal(bad, number + 1, can_skip=self.skip_bad is not None)

    def _row(self, value: Any, number: int, renderer: ChatRenderer, used: frozenset[str]) -> CodedRow:
        row = self.row(value, number)
        coded = self._as_it_is(row) if self.form is None else self._coded(row, renderer, used)
        parts = [coded, *([coded.rejected] if coded.rejected is not None else [])]
        weighted = any(part.whole.weights is not None or part.weight != 1 for part in parts)
        if weighted and self.inputs.unweighted and not coded.missing:
            raise row.error(f"its weight is neither 0 nor 1, and {self.inputs.unweighted}.")
        return coded

    def _coded(self, row: Row, renderer: ChatRenderer, used: frozenset[str]) -> CodedRow:
        assert self.form is not None
        example = self._example(row)
        if isinstance(example, Prompted):
            return self._prompted(row, example, renderer)
        columns = [name for name, value in row.values.items() if name not in used and not is_nothing(value)]
        unused = [(COLUMNS, repr(name)) for name in columns]
        for name in columns:
            row.check_unused(name)
        self._check_good(row)
        weight = row.weight()
        more: dict[str, Any] = {name: row.whole_number(name) for name in self.inputs.numbers}
        if isinstance(example, Labelled):
            return self._labelled(row, example, more, weight, tuple(unused))
        if isinstance(example, Tagged):
            return self._tagged(row, example, more, weight, tuple(unused))
        if isinstance(example, Compared):
            found = self._compared(row, example, renderer, "" if weight else "its weight is 0", weight)
            if MARGIN in self.form.may and self.columns.get(MARGIN, MARGIN) in row.values:
                more[MARGIN] = row.number_of(MARGIN)
            return replace(found, more=more, unused=(*unused, *found.unused))
        whole, reason, more_unused = self._encoded(row, example, renderer)
        whole, reason = whole.weighted(weight or 1.0), reason if weight else "its weight is 0"
        if self.form is VERDICT:
            good = self._verdict(row)
            more[DESIRABLE], reason = float(bool(good)), reason or ("the label is empty" if good is None else "")
        coded = CodedRow(
            row.number,
            whole,
            self.limit,
            self.inputs.encoder_decoder,
            reason,
            None,
            more,
            unused=(*unused, *more_unused),
            system=system_of(example),
            joint="" if self.inputs.encoder_decoder else joint_of(example),
        )
        return coded if coded.missing else replace(coded, unused=(*self._empty(row), *coded.unused))

    def _empty(self, row: Row) -> list[Unused]:
        """The columns with the context of what is learned, such as the prompt, that are empty in a row."""
        assert self.form is not None
        read = ((column, row.values[column]) for column in map(self._column, self.form.needs[:-1]))
        return [
            (EMPTY, repr(column))
            for column, value in read
            if is_nothing(value) or (isinstance(value, str) and not value.strip())
        ]

    def _column(self, name: str) -> str:
        """The column with the part of a form."""
        return self.columns.get(name, name)

    def _prompted(self, row: Row, example: Prompted, renderer: ChatRenderer) -> CodedRow:
        """A row with a prompt alone; a prompt that is too long is left out."""
        tools = self.columns.get("tools", "tools")
        own = {self.columns.get(name, name) for name in (*self.form.needs, *self.form.may)} if self.form else set()
        others = {name: value for name, value in row.values.items() if name not in own}
        for name in others:
            row.check_unused(name)
        given, unused = example.prompt, list[Unused]()
        prompt: Any = given
        if isinstance(given, str):
            ids = list(self.tokenizer(given)["input_ids"]) if given.strip() else []
            unused += [] if row.tools() is None else [(COLUMNS, repr(tools))]
        else:
            prompt = [dict(message) for message in given.messages]
            text = _rendered(given, row.number, self.tokenizer, renderer.prompt) if prompt else ""
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if prompt else []
            unused += [(MESSAGES, name) for name in given.unused]
        reason = "" if ids else "the prompt is empty"
        if len(ids) > self.limit:
            reason = f"its prompt has {len(ids):,} tokens, and at most {self.limit:,} are read"
        return CodedRow(
            row.number,
            Encoded(ids, [IGNORED_LABEL] * len(ids)),
            self.limit,
            reason=reason,
            unused=tuple(unused),
            system=None if isinstance(given, str) else system_of(given),
            prompted={"prompt": prompt, "columns": others, "number": row.number},
        )

    def _compared(self, row: Row, example: Compared, renderer: ChatRenderer, reason: str, weight: float) -> CodedRow:
        """A row with two completions, each coded like that of a row with one."""
        parts, unused = [], list[Unused]()
        for name, part in (("chosen", example.chosen), ("rejected", example.rejected)):
            whole, missing, more_unused = self._encoded(row, part, renderer)
            unused += more_unused
            missing = f"{name}: {missing}" if missing else ""
            coded = CodedRow(row.number, whole, self.limit, reason=reason or missing, weight=weight)
            parts.append(replace(coded, system=system_of(part)))
        joint = "" if self.inputs.encoder_decoder else joint_of(example)
        return replace(parts[0], rejected=parts[1], unused=tuple(unused), joint=joint)

    def _verdict(self, row: Row) -> bool | None:
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

    def _check_good(self, row: Row) -> None:
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

    def _encoded(self, row: Row, example: Example, renderer: ChatRenderer) -> tuple[Encoded, str, list[Unused]]:
        """A tokenised row, the reason why there is nothing to train on (or empty), and its parts that are not used."""
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
        assert isinstance(example, Plain)
        reason = "" if example.text.strip() else "the text is empty"
        return encode(self.tokenizer, example.text, [Span(0, len(example.text))], whole=True), reason, []

    def _labelled(
        self, row: Row, example: Labelled, more: Mapping[str, Any], weight: float, unused: tuple[Unused, ...]
    ) -> CodedRow:
        """A row for a classifier, truncated by the tokenizer, which keeps special tokens at the end."""
        texts = [example.text] if example.pair is None else [example.text, example.pair]
        label = self._label(row, example.label, "label")
        reason = "the text is empty" if is_nothing(example.text) else "the label is empty" if label is None else ""
        reason = reason if weight else "its weight is 0"
        whole = self.tokenizer(*texts)
        ids = list(whole["input_ids"])
        read = whole if len(ids) <= self.limit else self.tokenizer(*texts, truncation=True, max_length=self.limit)
        columns = (_SECOND,) if self.inputs.columns is None or _SECOND in self.inputs.columns else ()
        tensors = {name: list(read[name]) for name in ("input_ids", *columns) if name in read}
        return CodedRow(
            row.number, Encoded(ids, []), self.limit, False, reason, label, {**tensors, **more}, weight, unused
        )

    def _tagged(
        self, row: Row, example: Tagged, more: Mapping[str, Any], weight: float, unused: tuple[Unused, ...]
    ) -> CodedRow:
        """A row with a label for each word; it is cut by the tokenizer, or split between words."""
        words, labels = example.words, self._tags(row, example.tags)
        whole = encode_words(self.tokenizer, words, labels)
        reason = "there are no words" if not words else "" if weight else "its weight is 0"
        if not {*range(len(words))} <= {*whole.owners}:
            unused = (*unused, (UNTOKENISED, f"words of {self.columns.get('tokens', 'tokens')!r}"))

        def coded(tokens: TaggedTokens, first: int, last: int) -> CodedRow:
            ids = tokens.encoded.input_ids
            read = tokens
            if len(ids) > self.limit:
                read = encode_words(self.tokenizer, words[first:last], labels[first:last], self.limit)
            taken = self.inputs.columns
            given: dict[str, Any] = {n: v for n, v in read.more.items() if taken is None or n in taken}
            given |= {"input_ids": read.encoded.input_ids, "labels": read.encoded.labels}
            given |= {LOSS_WEIGHTS: [weight] * len(read.encoded.labels)} if weight not in (0, 1) else {}
            return CodedRow(
                row.number,
                tokens.encoded,
                self.limit,
                reason=reason,
                more={**given, **more},
                weight=weight,
                unused=unused,
                own_labels=True,
            )

        found = coded(whole, 0, len(words))
        if not found.cut or self.options.long != "split":
            return found
        groups = [(part.start, part.stop) for part in whole.groups(len(words), self.limit)]
        parts = [(encode_words(self.tokenizer, words[a:b], labels[a:b]), a, b) for a, b in groups]
        return replace(found, pieces=tuple(coded(*part) for part in parts))

    def _tags(self, row: Row, tags: Sequence[Any]) -> list[int]:
        """The labels of a row's words.

        Raises:
            TrainingError: a tag is not one of the classes.
        """
        classes, labels = self.inputs.classes, []
        assert classes is not None
        for place, tag in enumerate(tags):
            try:
                labels.append(classes.tag(self._known(tag)))
            except ValueError as error:
                column = self.columns.get("tags", "tags")
                raise row.error(f"tag {place} of {column!r} is {tag!r:.40}; {error}.") from None
        return labels

    def _known(self, label: Any) -> Any:
        """A label by its name, if the dataset has names that the model knows: it may number them in another order."""
        classes = self.inputs.classes
        assert classes is not None
        return self._named(label) if classes.names.keys() >= {*self.class_names} else label

    def _label(self, row: Row, value: Any, column: str) -> Any:
        """The label of a classifier's row.

        Raises:
            TrainingError: it is not one of the classes.
        """
        classes = self.inputs.classes
        assert classes is not None
        value = self._known(value)
        try:
            return classes.label(value)
        except ValueError as error:
            raise row.error(f"{self.columns.get(column, column)!r} is {value!r:.40}; {error}.") from None

    def _as_it_is(self, row: Row) -> CodedRow:
        """A row that is tokenised already; missing labels are copied from the ids, as the collator does."""
        values = renamed(row.values, self.columns)
        ids = _listed(values.get("input_ids", ()))
        name = next((name for name in LABELS if values.get(name) is not None), None)
        given_labels = None if name is None else values[name]
        weight = row.weight()
        reason = "" if weight else "its weight is 0"
        unused = tuple((COLUMNS, repr(name)) for name in self.extra(row.values) if name != self.group)
        more = self._kept(values)
        per_token = self.inputs.classes is not None and not self.inputs.has_class
        if self.inputs.has_class:
            label, weight = self._label(row, given_labels, name or "labels"), weight * row.weight(LOSS_WEIGHTS)
            reason = reason or ("the label is empty" if label is None else "")
            return CodedRow(row.number, Encoded(ids, []), len(ids), False, reason, label, more, weight, unused)
        seen = _listed(values.get("attention_mask", [1] * len(ids)))
        copied = [token if seen else IGNORED_LABEL for token, seen in zip(ids, seen, strict=False)]
        if per_token and given_labels is None and self.inputs.labels_needed:
            raise row.error("it has no labels: give the class of each token.")
        labels = copied if given_labels is None else _listed(given_labels)
        labels, weights = self._masked(row, values, labels)
        whole = Encoded(ids, labels, weights).weighted(weight or 1.0)
        limit, encoder_decoder = max(len(ids), len(labels)), self.inputs.encoder_decoder
        return CodedRow(
            row.number, whole, limit, encoder_decoder, reason, None, more, unused=unused, own_labels=per_token
        )

    def _masked(self, row: Row, values: Mapping[str, Any], labels: list[int]) -> tuple[list[int], list[float] | None]:
        """The labels selected by all masks of a row, and their weights.

        Raises:
            TrainingError: a mask and the labels differ in length, or a weight is negative or not finite.
        """
        weights = None
        for name in (*MASKS, LOSS_WEIGHTS):
            if values.get(name) is None:
                continue
            factors = _listed(values[name])
            if len(factors) != len(labels):
                raise row.error(f"{name!r} has {len(factors)} numbers for {len(labels)} labels.")
            if any(not 0 <= factor < float("inf") for factor in factors):
                raise row.error(f"{name!r} has a number that is negative or not finite.")
            labels = [label if factor else IGNORED_LABEL for label, factor in zip(labels, factors, strict=True)]
            weights = [float(factor) for factor in factors] if name == LOSS_WEIGHTS else weights
        return labels, weights

    def extra(self, columns: Sequence[str] | Mapping[str, Any]) -> list[str]:
        """The columns of tokenised rows that are not used.

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

    def _kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a tokenised row for the model other than tokens and labels."""
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
    form = form_of(available, columns or {}, usual=inputs.forms, kind=inputs.kind, first=first, chat=chat)
    if inputs.tokens_only and (form is not None or {*available, *mapping}.isdisjoint((*LABELS, "start_positions"))):
        raise TrainingError(f"{inputs.tokens_only}; found {listed(available)}.", columns=available)
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
    return min(int(getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH)), DEFAULT_MAX_LENGTH)


def columns_of(rows: Any) -> tuple[str, ...]:
    """Names of the columns of opened rows.

    Raises:
        TrainingError: the data has no named columns, or is empty.
    """
    names = getattr(rows, "column_names", None)
    return tuple(map(str, names)) if names is not None else keys_of(first_row(rows))


def is_plain(data: Any, tokenizer: Any = None, columns: Mapping[str, str] | None = None) -> bool | None:
    """Whether rows are text to which no chat template is applied; None for rows that are tokenised already.

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
    """A tokenised row with the names that models take.

    Args:
        row: the row.
        columns: name that models take -> column, where they differ.
    """
    return {**row, **{name: row[column] for name, column in columns.items()}}


def _encode_chat(chat: Chat, number: int, tokenizer: Any, renderer: ChatRenderer) -> tuple[Encoded, str, list[Unused]]:
    rendered = _rendered(chat, number, tokenizer, renderer.render)
    unused = [(MESSAGES, name) for name in chat.unused] + [(UNPRINTED, name) for name in rendered.left_out]
    unused += [MASKED_REASONING] if chat.masks else []
    return encode(tokenizer, rendered.text, rendered.spans, special=False), rendered.missing, unused


def _rendered(chat: Chat, number: int, tokenizer: Any, render: Callable[[Chat], Rendered]) -> Rendered:
    """A rendered chat; errors name the row."""
    template = str(getattr(tokenizer, "chat_template", "") or "")
    check_roles(number, chat, template)
    if template and (why := why_not_used(chat.template, template)):
        raise TrainingError(f"Row {number}: {TEMPLATE}: {why}", index=number)
    try:
        return render(chat)
    except TrainingError as error:
        if not template:  # an error of all rows, which names none of them
            raise
        raise TrainingError(f"Row {number}: {error}", index=number) from None
    except Exception as error:  # a template runs code of its own and may raise anything to refuse a chat
        raise TrainingError(
            f"Row {number}: the chat template refuses it: {in_one_line(error) or type(error).__name__}", index=number
        ) from None


def _enumerated(names: Sequence[str]) -> str:
    """The names of classes with their numbers."""
    known = ", ".join(f"{number} = {name}" for number, name in enumerate(names[:_NAMED]))
    return f"{known} and {len(names) - _NAMED} more" if len(names) > _NAMED else known


def _plain(value: Any) -> Any:
    """A value of a table as one of Python."""
    return value.item() if getattr(value, "shape", None) == () else value


def _listed(value: Any) -> list[Any]:
    """Numbers of a row as a list; an empty list for a single number, such as a class."""
    numbers = value.tolist() if hasattr(value, "tolist") else value
    return list(numbers) if isinstance(numbers, (list, tuple)) else []
