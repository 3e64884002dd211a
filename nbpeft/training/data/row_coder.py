"""Tokenizes a row of any form: text, chats, pairs, comparisons, classes and tags, or tokens as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from nbpeft.errors import TrainingError, in_one_line
from nbpeft.names import DESIRABLE, IGNORED_LABEL, LOSS_WEIGHTS
from nbpeft.training.data.chats import ChatRenderer
from nbpeft.training.data.encoding import CodedRow, Encoded, Span, encode
from nbpeft.training.data.forms import (
    MARGIN,
    TEMPLATE,
    VERDICT,
    Chat,
    Compared,
    Example,
    Labelled,
    Pair,
    Plain,
    Prompted,
    Tagged,
    check_roles,
)
from nbpeft.training.data.left_out import (
    COLUMNS,
    EMPTY,
    GIVE_UP,
    MESSAGES,
    UNPRINTED,
    UNTOKENISED,
    Unused,
    reason_of,
    refusal,
)
from nbpeft.training.data.options import MASKED_REASONING, why_not_used
from nbpeft.training.data.prompt_formats import joint_of, system_of
from nbpeft.training.data.reading import LABELS, MASKS, TOKEN_TYPES, Reading, as_list, renamed
from nbpeft.training.data.row import Row, is_nothing
from nbpeft.training.data.sources import is_stream
from nbpeft.training.data.tags import TaggedTokens, encode_words, space_token, with_spaces

Rendered = TypeVar("Rendered")


def coded_rows(reading: Reading) -> Iterator[CodedRow]:
    """Tokenizes the rows of opened data, one after the other.

    Rows that cannot be read have a reason to be left out if ``skip_bad`` is set. Otherwise all rows are read to
    count them; of a stream, only up to the first.

    Args:
        reading: the data, and how it is read.

    Raises:
        TrainingError: rows cannot be read; names them.
    """
    coder, number = RowCoder(reading), -1
    bad: list[tuple[int, TrainingError]] = []
    for number, value in enumerate(reading.rows):
        try:
            coded = coder.coded(value, number)
        except TrainingError as error:
            if error.details.get("index") != number:  # what is wrong with all rows
                raise
            bad.append((number, error))
            if reading.skip_bad:
                yield CodedRow(number, Encoded([], []), reading.limit, reason=reason_of(error))
            elif is_stream(reading.rows) or len(bad) == number + 1 == GIVE_UP:
                break
        else:
            if reading.skip_bad or not bad:
                yield from coded.fitted(reading.options.long)
    if bad and not reading.skip_bad:
        raise refusal(bad, number + 1, can_skip=reading.skip_bad is not None)


class RowCoder:
    """Tokenizes the rows of opened data.

    Args:
        reading: the data, and how it is read.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.form, self.columns, self.inputs = reading.form, reading.columns, reading.inputs
        self.tokenizer, self.limit = reading.tokenizer, reading.limit
        self._renderer, self._used = ChatRenderer(reading.tokenizer), reading.used

    def coded(self, value: Any, number: int) -> CodedRow:
        """Tokenizes a row; a row that is tokenized already gets its masks and weights applied.

        Args:
            value: the row.
            number: its number, 0 for the first.

        Raises:
            TrainingError: it cannot be read; names it, unless all rows have the same fault.
        """
        row = self.reading.row(value, number)
        coded = self._as_it_is(row) if self.form is None else self._coded(row)
        parts = [coded, *([coded.rejected] if coded.rejected is not None else [])]
        weighted = any(part.whole.weights is not None or part.weight != 1 for part in parts)
        if weighted and self.inputs.unweighted and not coded.missing:
            raise row.error(f"its weight is neither 0 nor 1, and {self.inputs.unweighted}.")
        return coded

    def _coded(self, row: Row) -> CodedRow:
        assert self.form is not None
        example = self.reading.read(row)
        if isinstance(example, Prompted):
            return self._prompted(row, example)
        columns = [name for name, value in row.values.items() if name not in self._used and not is_nothing(value)]
        unused = [(COLUMNS, repr(name)) for name in columns]
        for name in columns:
            row.check_unused(name)
        self.reading.check_good(row)
        weight = row.weight()
        more: dict[str, Any] = {name: row.whole_number(name) for name in self.inputs.numbers}
        if isinstance(example, Labelled):
            return self._labelled(row, example, more, weight, tuple(unused))
        if isinstance(example, Tagged):
            return self._tagged(row, example, more, weight, tuple(unused))
        if isinstance(example, Compared):
            found = self._compared(row, example, "" if weight else "its weight is 0", weight)
            if MARGIN in self.form.may and self.columns.get(MARGIN, MARGIN) in row.values:
                more[MARGIN] = row.number_of(MARGIN)
            return replace(found, more=more, unused=(*unused, *found.unused))
        whole, reason, more_unused = self._encoded(row, example)
        whole, reason = whole.weighted(weight or 1.0), reason if weight else "its weight is 0"
        if self.form is VERDICT:
            good = self.reading.verdict(row)
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
        columns = (self.columns.get(name, name) for name in self.form.needs[:-1])
        read = ((column, row.values[column]) for column in columns)
        return [
            (EMPTY, repr(column))
            for column, value in read
            if is_nothing(value) or (isinstance(value, str) and not value.strip())
        ]

    def _prompted(self, row: Row, example: Prompted) -> CodedRow:
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
            text = _rendered(given, row.number, self.tokenizer, self._renderer.prompt) if prompt else ""
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

    def _compared(self, row: Row, example: Compared, reason: str, weight: float) -> CodedRow:
        """A row with two completions, each coded like that of a row with one."""
        parts, unused = [], list[Unused]()
        for name, part in (("chosen", example.chosen), ("rejected", example.rejected)):
            whole, missing, more_unused = self._encoded(row, part)
            unused += more_unused
            missing = f"{name}: {missing}" if missing else ""
            coded = CodedRow(row.number, whole, self.limit, reason=reason or missing, weight=weight)
            parts.append(replace(coded, system=system_of(part)))
        joint = "" if self.inputs.encoder_decoder else joint_of(example)
        return replace(parts[0], rejected=parts[1], unused=tuple(unused), joint=joint)

    def _encoded(self, row: Row, example: Example) -> tuple[Encoded, str, list[Unused]]:
        """A tokenized row, the reason why there is nothing to train on (or empty), and its parts that are not used."""
        assert self.form is not None
        if self.inputs.encoder_decoder and not isinstance(example, Pair):
            raise TrainingError(
                f"An encoder-decoder model needs rows with prompt and completion, found {self.form.name}."
            )
        if isinstance(example, Chat):
            return _encode_chat(example, row.number, self.tokenizer, self._renderer)
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
        columns = (TOKEN_TYPES,) if self.inputs.columns is None or TOKEN_TYPES in self.inputs.columns else ()
        tensors = {name: list(read[name]) for name in ("input_ids", *columns) if name in read}
        return CodedRow(
            row.number, Encoded(ids, []), self.limit, False, reason, label, {**tensors, **more}, weight, unused
        )

    def _tagged(
        self, row: Row, example: Tagged, more: Mapping[str, Any], weight: float, unused: tuple[Unused, ...]
    ) -> CodedRow:
        """A row with a label for each word; it is cut by the tokenizer, or split between words."""
        labels, space = self._tags(row, example.tags), self._space
        words = example.words if space is None else with_spaces(example.words)
        whole = encode_words(self.tokenizer, words, labels, space=space)
        reason = "there are no words" if not words else "" if weight else "its weight is 0"
        if not {*range(len(words))} <= {*whole.owners}:
            unused = (*unused, (UNTOKENISED, f"words of {self.columns.get('tokens', 'tokens')!r}"))

        def coded(tokens: TaggedTokens, first: int, last: int) -> CodedRow:
            ids = tokens.encoded.input_ids
            read = tokens
            if len(ids) > self.limit:
                read = encode_words(self.tokenizer, words[first:last], labels[first:last], self.limit, space=space)
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
        if not found.cut or self.reading.options.long != "split":
            return found
        groups = [(part.start, part.stop) for part in whole.groups(len(words), self.limit)]
        parts = [(encode_words(self.tokenizer, words[a:b], labels[a:b], space=space), a, b) for a, b in groups]
        return replace(found, pieces=tuple(coded(*part) for part in parts))

    @cached_property
    def _space(self) -> int | None:
        return space_token(self.tokenizer)

    def _tags(self, row: Row, tags: Sequence[Any]) -> list[int]:
        """The labels of a row's words.

        Raises:
            TrainingError: a tag is not one of the classes.
        """
        classes, labels = self.inputs.classes, []
        assert classes is not None
        for place, tag in enumerate(tags):
            try:
                labels.append(classes.tag(self.reading.named_label(tag)))
            except ValueError as error:
                column = self.columns.get("tags", "tags")
                raise row.error(f"tag {place} of {column!r} is {tag!r:.40}; {error}.") from None
        return labels

    def _label(self, row: Row, value: Any, column: str) -> Any:
        """The label of a classifier's row.

        Raises:
            TrainingError: it is not one of the classes.
        """
        classes = self.inputs.classes
        assert classes is not None
        value = self.reading.named_label(value)
        try:
            return classes.label(value)
        except ValueError as error:
            raise row.error(f"{self.columns.get(column, column)!r} is {value!r:.40}; {error}.") from None

    def _as_it_is(self, row: Row) -> CodedRow:
        """A row that is tokenized already; missing labels are copied from the ids, as the collator does."""
        values = renamed(row.values, self.columns)
        if "input_ids" not in values:
            unused = tuple((COLUMNS, repr(name)) for name in self.reading.extra(row.values))
            kept = {name: value for name, value in values.items() if (COLUMNS, repr(name)) not in unused}
            return CodedRow(row.number, Encoded([], []), 0, unused=unused, inputs=kept)
        ids = as_list(values.get("input_ids", ()))
        name = next((name for name in LABELS if values.get(name) is not None), None)
        given_labels = None if name is None else values[name]
        weight = row.weight()
        reason = "" if weight else "its weight is 0"
        unused = tuple((COLUMNS, repr(name)) for name in self.reading.extra(row.values) if name != self.reading.group)
        more = self.reading.kept(values)
        per_token = self.inputs.classes is not None and not self.inputs.has_class
        if self.inputs.has_class:
            label, weight = self._label(row, given_labels, name or "labels"), weight * row.weight(LOSS_WEIGHTS)
            reason = reason or ("the label is empty" if label is None else "")
            return CodedRow(row.number, Encoded(ids, []), len(ids), False, reason, label, more, weight, unused)
        seen = as_list(values.get("attention_mask", [1] * len(ids)))
        copied = [token if seen else IGNORED_LABEL for token, seen in zip(ids, seen, strict=False)]
        if per_token and given_labels is None and self.inputs.labels_needed:
            raise row.error("it has no labels: give the class of each token.")
        labels = copied if given_labels is None else as_list(given_labels)
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
            factors = as_list(values[name])
            if len(factors) != len(labels):
                raise row.error(f"{name!r} has {len(factors)} numbers for {len(labels)} labels.")
            if any(not 0 <= factor < float("inf") for factor in factors):
                raise row.error(f"{name!r} has a number that is negative or not finite.")
            labels = [label if factor else IGNORED_LABEL for label, factor in zip(labels, factors, strict=True)]
            weights = [float(factor) for factor in factors] if name == LOSS_WEIGHTS else weights
        return labels, weights


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
