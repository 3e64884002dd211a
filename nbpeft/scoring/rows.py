"""Rows as they are scored: the prompt, the reference, and what a metric needs in addition."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from nbpeft.display.numbers import count, plural
from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.errors import ConfigError, TrainingError, in_one_line, with_article
from nbpeft.names import IGNORED_LABEL
from nbpeft.scoring.metrics import Metric, Needs, value_of
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.data import HeldOut, is_stream, open_data
from nbpeft.training.data.chats import ChatRenderer
from nbpeft.training.data.checks import check_row
from nbpeft.training.data.classes import SINGLE_LABEL, Classes
from nbpeft.training.data.encoding import CodedRow, Span, decoded, encode
from nbpeft.training.data.forms import (
    COMPARED,
    TEXT,
    Chat,
    Compared,
    Example,
    Form,
    Pair,
    Plain,
    check_roles,
    likely_completion,
    row_of,
)
from nbpeft.training.data.left_out import named_rows, reason_of
from nbpeft.training.data.options import REASONING, RowOptions, why_not_used
from nbpeft.training.data.reading import ModelInputs, Reading, columns_of, reading
from nbpeft.training.data.row import Row, is_nothing
from nbpeft.training.data.row_coder import coded_rows
from nbpeft.training.data.tokenized import split_line
from nbpeft.training.loop.rows import check_reading, classes_of, is_causal, model_inputs
from nbpeft.training.watching.generation import PromptBatch

_STREAMED = 1000
"""The number of rows of a stream that are read."""
TRIED = 8
"""The greatest number of rows on which a metric is tried before anything is computed."""
CHOICES, ANSWER = "choices", "answer"
"""The columns of a row with its options, and with the right one: its text or its number."""
_OWN = (CHOICES, ANSWER)
_LOSS = " Text has no answer to compare: metric='loss' scores it."


@dataclass(frozen=True)
class ScoredRow:
    """One row to score.

    Attributes:
        number: its number in the data, 0 for the first.
        given: the row as it was given.
        prompt: the prompt as text, for display.
        prompt_ids: its token ids.
        reference: the text of the right answer; empty if there is none.
        reference_count: number of its tokens.
        spelled: the reference as the tokenizer decodes its tokens, where that is another text: many put a space before
            every word. Empty otherwise.
        coded: the tokenized row with its labels, for losses and classes.
        other_parts: the other parts of a row that was split, for losses.
        options: the tokenized row with each option, whose labels are those of the option; with its text.
        right: the number of the right option.
    """

    number: int
    given: Any
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()
    reference: str = ""
    reference_count: int = 0
    spelled: str = ""
    coded: Mapping[str, Any] = field(default_factory=dict)
    other_parts: tuple[Mapping[str, Any], ...] = ()
    options: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    right: int = 0

    def answer(self, text: str) -> str:
        """The text of an answer, in which the reference's tokens are spelled as the reference is."""
        if self.spelled and text.startswith(self.spelled):
            return self.reference + text.removeprefix(self.spelled)
        return text


@dataclass(frozen=True)
class ScoredRows:
    """All rows to score.

    Attributes:
        rows: the rows.
        notes: messages about rows that are left out or cut.
        ends: further tokens that end an answer: those with which the chat template ends a turn.
        inputs: the inputs of the model.
    """

    rows: tuple[ScoredRow, ...]
    notes: tuple[str, ...]
    ends: frozenset[int]
    inputs: ModelInputs


class _Missing(Exception):
    """Why a row cannot be scored."""


def usual_metric(model: nn.Module) -> str:
    """Returns the metric with which a model is scored if none is given."""
    return "accuracy" if model_inputs(model).has_class else "exact"


def read_rows(
    model: nn.Module,
    data: Any,
    metrics: Sequence[Metric],
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    skip_bad: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    usual_variables: Mapping[str, Any] | None = None,
    reasoning: str = "keep",
    long: str | None = None,
    usual_long: str = "cut",
    classes: Classes | None = None,
    held_out: Sequence[int] | HeldOut | None = None,
) -> ScoredRows:
    """Reads rows as training does, and finds the reference of each.

    Args:
        model: the model, adapted or bare.
        data: rows in any form of training, or where they are.
        metrics: the metrics, which decide what a row needs.
        tokenizer: the tokenizer of the model.
        max_length: as for ``prepare_data``; for metrics of losses and classes.
        columns: name -> the column in the data, as for ``prepare_data``.
        separator: as for ``prepare_data``.
        skip_bad: as for ``prepare_data``.
        chat_template_kwargs: as for ``prepare_data``.
        usual_variables: those that are used by default, as far as the chat template has them.
        reasoning: ``drop`` removes the reasoning of the assistant from conversations, ``keep`` does not.
        long: what happens to longer rows, as for ``prepare_data``; they are answered whole unless they are dropped.
        usual_long: the same by default, where it has an effect.
        classes: the classes of a classifier, if a training has named them; by default as in its config.
        held_out: the numbers of the rows to score; None for all.

    Raises:
        ConfigError: an argument is invalid, or a metric does not fit the model.
        TrainingError: the data cannot be read, no row can be scored, or a metric fails on the references themselves.
    """
    check_reading(tokenizer, max_length)
    needs = {metric.needs for metric in metrics}
    inputs = model_inputs(model)
    inputs = inputs if classes is None else replace(inputs, classes=classes)
    _check_model(model, inputs, needs, tokenizer)
    opened = open_data(data, separator, skip_bad=skip_bad)
    reader, own = _reader(opened, tokenizer, needs, inputs, max_length, columns)
    values = list(itertools.islice(iter(opened), _STREAMED)) if is_stream(opened) else list(opened)
    if not values:
        raise TrainingError("The stream has no rows.")
    wanted = range(len(values)) if held_out is None else _wanted(held_out, values, stream=is_stream(opened))
    known = replace(reader.inputs, classes=inputs.classes)  # a trained head has its order of classes already
    reader = replace(reader, rows=values, skip_bad=skip_bad, inputs=known)
    variables = _variables(reader, chat_template_kwargs, usual_variables or {})
    long = _long(reader, long, usual_long, needs)
    reader = replace(reader, options=RowOptions(reasoning=reasoning, long=long, chat_template_kwargs=variables))
    reading_rows = _Rows(model, reader, own, metrics)
    rows, left_out = _read(reading_rows, len(values), wanted, skip_bad=skip_bad)
    if not rows:
        hint = _LOSS if reader.form is TEXT else ""
        hint = _references_in(columns_of(opened), columns) if reader.form is _PROMPT else hint
        raise TrainingError(f"None of the {plural(len(wanted), 'row')} can be scored: {named_rows(left_out)}.{hint}")
    _check_tokens(model, rows, inputs)
    _check_metrics(metrics, rows)
    notes = []
    if held_out is not None:
        which = ", those that were held out from the training" if isinstance(held_out, HeldOut) else ""
        notes.append(f"{count(len(wanted))} of {plural(len(values), 'row')}{which}")
    elif is_stream(opened) and len(values) == _STREAMED:
        notes.append(f"these are the first {count(_STREAMED)} rows of a stream")
    if left_out:
        notes.append(f"{plural(len(left_out), 'row')} left out: {named_rows(left_out)}")
    notes += reading_rows.notes
    return ScoredRows(tuple(rows), tuple(notes), frozenset(reading_rows.ends), inputs)


def _read(
    reading: _Rows, row_count: int, wanted: Collection[int], *, skip_bad: bool
) -> tuple[list[ScoredRow], list[tuple[int, str]]]:
    """The wanted rows that can be scored; and the number of each other one, with why it is left out."""
    rows, left_out = [], []
    for number in range(row_count):
        if number not in wanted:
            reading.skip()
            continue
        try:
            rows.append(reading.read(number))
        except _Missing as reason:
            left_out.append((number, str(reason)))
        except TrainingError as error:
            if not skip_bad or error.details.get("index") != number:
                raise
            left_out.append((number, reason_of(error)))
    return rows, left_out


def _wanted(held_out: Sequence[int] | HeldOut, values: Sequence[Any], *, stream: bool) -> set[int]:
    """The numbers of the rows to score."""
    if stream:
        raise ConfigError("held_out needs all rows, and these are a stream", field="held_out")
    if isinstance(held_out, HeldOut) and held_out.total != len(values):
        raise ConfigError(
            f"the adapter was trained on {plural(held_out.total, 'row')}, and these are {count(len(values))}: its "
            "held-out rows are not known among them",
            field="held_out",
        )
    numbers = _listed(held_out)
    wrong = [number for number in numbers if not _is_number(number, len(values))]
    if wrong or not numbers:
        given = f"row {wrong[0]!r:.40}" if wrong else "no row"
        raise ConfigError(f"held_out has {given}; the rows are 0 to {count(len(values) - 1)}", field="held_out")
    return {int(number) for number in numbers}


def _listed(held_out: Any) -> list[Any]:
    if isinstance(held_out, HeldOut):
        return list(held_out.numbers)
    try:  # arrays and tensors have no truth value
        return list(held_out.tolist() if hasattr(held_out, "tolist") else held_out)
    except TypeError:
        wrong = f"held_out must be numbers of rows in a list, not {with_article(held_out)}"
        raise ConfigError(wrong, field="held_out") from None


def _is_number(number: Any, total: int) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool) and number in range(total)


def _variables(reader: Reading, given: Mapping[str, Any] | None, usual: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables for the chat template."""
    if given:
        replace(reader, options=RowOptions(chat_template_kwargs=given)).check_options()
        return given
    template = str(getattr(reader.tokenizer, "chat_template", "") or "")
    return {name: value for name, value in usual.items() if not why_not_used({name: value}, template)}


def _long(reader: Reading, given: str | None, usual: str, needs: set[Needs]) -> str:
    """What happens to rows that are too long."""
    long, why = usual if given is None else RowOptions(long=given).long, ""
    if reader.form is _PROMPT and long != "cut":
        why = f"long={long!r} has no effect: prompts are answered whole"
    elif long == "split" and "tokens" not in needs:
        why = "long='split' is for loss and perplexity: rows are answered whole"
    try:
        if why:
            raise ConfigError(why, field="long")
        replace(reader, options=RowOptions(long=long)).check_options()
    except ConfigError:
        if given is not None:
            raise
        return "cut"
    return long


def is_scored_by_default(model: nn.Module) -> bool:
    """Whether a model can be scored without naming a metric: it answers prompts, or gives each text one class."""
    classes = classes_of(model)
    if classes is None:
        return hasattr(base_of(model), "generate")
    return not classes.per_token and classes.problem == SINGLE_LABEL


def _check_model(model: nn.Module, inputs: ModelInputs, needs: set[Needs], tokenizer: Any) -> None:
    """Refuses metrics that the model cannot be scored with."""
    name = type(base_of(model)).__name__
    if inputs.classes is None and "classes" in needs:
        raise ConfigError(f"accuracy is for classifiers, and {name} is none: choice compares the options of a row")
    if inputs.classes is not None and inputs.classes.per_token:
        raise ConfigError(
            f"{name} has a class for each token, and accuracy compares that of a row: evaluation rows of a training "
            "(eval_data) report accuracy and f1"
        )
    if inputs.classes is not None and needs != {"classes"}:
        raise ConfigError(f"{name} is a classifier: its metric is accuracy (metric='accuracy')")
    if inputs.classes is not None and inputs.classes.problem != SINGLE_LABEL:
        raise ConfigError(
            f"accuracy needs one class for each row, and {name} is for {inputs.classes.problem}: evaluation rows of a "
            "training (eval_data) report its loss and metrics"
        )
    if "options" in needs and inputs.encoder_decoder:
        raise ConfigError(f"choice needs a decoder, and {name} has an encoder")
    if "answers" in needs and not hasattr(base_of(model), "generate"):
        raise ConfigError(f"{name} cannot answer prompts: it has no generate()")
    if needs & {"answers", "options"} and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        given = "none is given" if tokenizer is None else f"not {with_article(tokenizer)}"
        raise ConfigError(f"a tokenizer is needed to score answers (tokenizer=…), {given}", field="tokenizer")


def _reader(
    opened: Any,
    tokenizer: Any,
    needs: set[Needs],
    inputs: ModelInputs,
    max_length: int | None,
    columns: Mapping[str, str] | None,
) -> tuple[Reading, Mapping[str, str]]:
    """How the rows are read, and where the options are. Rows with a prompt alone are read, too, if that is enough."""
    own = {name: name for name in _OWN}
    mapping = columns
    if isinstance(columns, Mapping):
        own |= {name: str(columns[name]) for name in _OWN if name in columns}
        mapping = {name: column for name, column in columns.items() if name not in _OWN}
    available = columns_of(opened)
    for name in _OWN:
        if own[name] != name and own[name] not in available:
            raise ConfigError(f"columns: the rows have no {own[name]!r:.40} for {name}", field="columns")
    prompt = (mapping or {}).get("prompt", "prompt")
    compared = inputs.classes is None and {*available, *(mapping or {})}.issuperset(COMPARED.needs)
    if compared:
        inputs = replace(inputs, kind=None)  # any kind: rows that also have another form are read in that form
    alone = not compared and "tokens" not in needs and "classes" not in needs and prompt in available
    if alone and (mapping or {}).get("completion", "completion") not in available:
        names = {"prompt": prompt} if prompt != "prompt" else {}
        return Reading(opened, _PROMPT, names, tokenizer, inputs=inputs), own
    found = reading(opened, tokenizer, max_length=max_length, columns=mapping or None, inputs=inputs)
    return replace(found, form=_PREFERRED) if found.form is COMPARED else found, own


def _check_metrics(metrics: Sequence[Metric], rows: Sequence[ScoredRow]) -> None:
    """Raises TrainingError if a metric of answers fails on all of the first right answers, before any is generated."""
    tried = [row for row in rows if row.reference][:TRIED]
    for metric in metrics:
        failures: list[TrainingError] = []
        for row in tried if metric.needs == "answers" else ():
            try:
                value_of(metric, row.reference, row.reference, row.given, row.number)
                break
            except TrainingError as error:
                failures.append(error)
        if failures and len(failures) == len(tried):
            which = "the reference" if len(tried) == 1 else f"the references of the first {len(tried)} rows"
            raise TrainingError(f"{failures[0]}; it fails on {which}", **failures[0].details) from failures[0]


def _references_in(available: Sequence[str], columns: Mapping[str, str] | None) -> str:
    """A hint for rows with a prompt alone: the column that likely has the references."""
    found = likely_completion(available)
    names = {**(columns or {}), "completion": found or "COLUMN"}
    where = f" If the references are in {found!r}" if found else " Say which column has the references"
    return f"{where}: columns={names}."


def _read_prompt(row: Row, chat: bool) -> Pair | Chat:
    if isinstance(row.value("prompt"), str):
        return Pair(row.text("prompt"), "")
    messages = row.messages("prompt")
    return Chat(messages.messages, (1.0,) * len(messages.messages), tools=row.tools())


def _read_preferred(row: Row, chat: bool) -> Example:
    """The completion that is preferred, as the reference; the other one is read, too, so that it is checked."""
    example = COMPARED.read(row, chat)
    assert isinstance(example, Compared)
    return example.chosen


_PREFERRED = replace(COMPARED, read=_read_preferred)
_PROMPT = Form("prompt", ("prompt",), _read_prompt, ("tools",))


class _Rows:
    """Reads one row after the other; counts those that were cut, and those whose reasoning was left out."""

    def __init__(self, model: nn.Module, reader: Reading, own: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        self.cut = self.without_reasoning = self.split_rows = self.split_parts = 0
        self.ends: set[int] = set()
        self._reader, self._own, self._metrics = reader, own, metrics
        self._needs = {metric.needs for metric in metrics}
        self._tokenizer = reader.tokenizer
        self._renderer = ChatRenderer(reader.tokenizer)
        tokens = self._needs & {"tokens", "classes"} or reader.form is None
        tokens = tokens or reader.options.long == "drop"
        self._coded = itertools.groupby(coded_rows(reader), lambda row: row.number) if tokens else None
        self._special = frozenset(getattr(self._tokenizer, "all_special_ids", ()))
        self._usual_ends = PromptBatch.of_tokens([], self._tokenizer, base_of(model)).ends

    def read(self, number: int) -> ScoredRow:
        """Reads a row.

        Raises:
            TrainingError: it has another form than the first one.
            _Missing: it cannot be scored.
        """
        given = self._reader.rows[number]
        parts = () if self._coded is None else tuple(next(self._coded)[1])
        coded = parts[0] if parts else None
        row = ScoredRow(number, given)
        if coded is not None and coded.dropped:
            raise _Missing(coded.missing)
        if self._needs & {"tokens", "classes"}:
            row = self._with_tokens(row, parts)
        if self._reader.form is None:
            row = self._of_tokens(row, coded)
        elif self._reader.inputs.classes is None:
            self._check_good(row)
            row = self._of_text(row)
        if "options" in self._needs:
            row = self._with_options(row)
        for metric in self._metrics:
            if metric.needs == "answers" and metric.needs_reference and not row.reference:
                raise _Missing("it has no reference")
            if reason := metric.check(row.reference, row.given):
                raise _Missing(reason)
        if "answers" in self._needs and not row.prompt_ids:
            raise _Missing("its prompt is empty")
        return row

    @property
    def notes(self) -> Iterator[str]:
        """What the references are, and what was cut or left out of rows."""
        if self._reader.form is _PREFERRED:
            chosen = self._reader.columns.get("chosen", "chosen")
            yield f"the references are the completions in {chosen!r}"
        if self.cut:
            yield f"{plural(self.cut, 'row')} cut to {self._reader.limit} tokens (max_length)"
        if self.split_rows:
            yield split_line(self.split_rows, self.split_parts)
        if self.without_reasoning:
            yield f"the reasoning of {plural(self.without_reasoning, 'row')} is left out: it was not learned"

    def skip(self) -> None:
        """Passes over the next row."""
        if self._coded is not None:
            next(self._coded)

    def _check_good(self, row: ScoredRow) -> None:
        """Leaves out a row whose completion is no reference, as its label marks it as bad."""
        if self._reader.form is _PROMPT or "options" in self._needs:  # the label may be the number of an option
            return
        if self._reader.is_bad(row_of(row.given, row.number, self._reader.columns)):
            raise _Missing("its label marks the completion as bad")

    def _with_tokens(self, row: ScoredRow, parts: Sequence[CodedRow]) -> ScoredRow:
        """The row with its tokens and labels; for a classifier with its text and class."""
        coded, *others = [part for part in parts if not part.missing] or parts
        if coded.missing:
            raise _Missing(coded.missing)
        self.cut += coded.cut
        self.split_rows += len(parts) > 1
        self.split_parts += len(parts) if len(parts) > 1 else 0
        classes = self._reader.inputs.classes
        if classes is None:
            return replace(row, coded=coded.row, other_parts=tuple(part.row for part in others))
        text = self._decoded(coded.whole.input_ids) if self._tokenizer is not None else ""
        name = next((name for name, number in classes.names.items() if number == coded.label), str(coded.label))
        return replace(row, coded=coded.row, prompt=text, reference=name)

    def _of_tokens(self, row: ScoredRow, coded: CodedRow | None) -> ScoredRow:
        """The prompt and the reference of a tokenized row: what comes before the last learned part, and that part."""
        assert coded is not None
        if self._tokenizer is None or self._reader.inputs.classes is not None:
            return row
        ids, labels = coded.whole.input_ids, coded.whole.labels
        if self._reader.inputs.encoder_decoder:
            prompt, learned = ids, [label for label in labels if label != IGNORED_LABEL]
        else:
            places = [place for place, label in enumerate(labels) if label != IGNORED_LABEL]
            last = places[-1] + 1 if places else len(ids)
            first = (
                next((n + 1 for n in reversed(range(last - 1)) if labels[n] == IGNORED_LABEL), 0) if places else last
            )
            prompt, learned = ids[:first], ids[first:last]
        return self._prompted(row, self._decoded(prompt), prompt, learned)

    def _of_text(self, row: ScoredRow) -> ScoredRow:
        """The prompt and the reference of a row of text."""
        example = self._reader.example(row.given, row.number)
        if isinstance(example, Chat):
            check_roles(row.number, example, str(getattr(self._tokenizer, "chat_template", "") or ""))
            self.without_reasoning += REASONING in example.unused
            before, turn = self._turn(example, row.number)
            ids = list(self._tokenizer(before, add_special_tokens=False)["input_ids"])
            printed = list(self._tokenizer(turn, add_special_tokens=False)["input_ids"]) if turn else []
            return self._prompted(row, _asked(example) or before, ids, printed)
        if isinstance(example, Pair):
            ids = list(self._tokenizer(example.prompt)["input_ids"])
            length = len(self._tokenizer(example.completion)["input_ids"]) if example.completion else 0
            reference = example.completion if example.completion.strip() else ""
            found = replace(row, prompt=example.prompt, prompt_ids=tuple(ids), reference=reference)
            return replace(found, reference_count=length, spelled=self._spelled(ids, reference))
        assert isinstance(example, Plain)
        ids = list(self._tokenizer(example.text)["input_ids"])
        return replace(row, prompt=example.text, prompt_ids=tuple(ids) if example.text.strip() else ())

    def _spelled(self, before: Sequence[int], reference: str) -> str:
        """What the tokenizer makes of the reference; empty if that is the same, or not all of it is known to it."""
        tokens = self._tokenizer(reference, add_special_tokens=False)["input_ids"] if reference else []
        if not tokens or getattr(self._tokenizer, "unk_token_id", None) in tokens:
            return ""
        text = decoded(self._tokenizer, before, tokens)
        return text if text != reference else ""

    def _turn(self, chat: Chat, number: int) -> tuple[str, str]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise TrainingError("The tokenizer has no chat template, and the rows are conversations.")
        try:
            return self._renderer.last_turn(chat)
        except TrainingError as error:
            raise TrainingError(f"Row {number}: {error}", index=number) from None
        except Exception as error:  # a template runs code of its own and may raise anything to refuse a chat
            reason = in_one_line(error) or type(error).__name__
            raise TrainingError(f"Row {number}: the chat template refuses it: {reason}", index=number) from None

    def _prompted(self, row: ScoredRow, text: str, ids: Sequence[int], answer: Sequence[int]) -> ScoredRow:
        """The row with its prompt, and with the tokens of an answer, up to its end token, as the reference."""
        self.ends.update([token for token in answer if token in self._special][-1:])  # that of a chat template
        ends = self._usual_ends | self.ends
        learned = list(itertools.takewhile(lambda token: token not in ends, answer))
        reference = decoded(self._tokenizer, ids, learned) if learned else ""
        return replace(
            row,
            prompt=text,
            prompt_ids=tuple(ids),
            reference=reference if reference.strip() else "",
            reference_count=len(learned),
        )

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _with_options(self, row: ScoredRow) -> ScoredRow:
        """The row with its options, each as the answer to the prompt."""
        if self._reader.form is None or not isinstance(row.given, Mapping):
            raise TrainingError("The metric choice needs rows of text with a prompt and choices; these are not.")
        options: Any = row.given.get(self._own[CHOICES])
        options = options.get("text") if isinstance(options, Mapping) else options
        options = options.tolist() if hasattr(options, "tolist") else options
        texts = isinstance(options, list | tuple) and all(isinstance(text, str) and text for text in options)
        if not texts or len(options) < 2:
            raise _Missing(f"{self._own[CHOICES]!r} is not a list of at least two texts")
        right = self._right(row, options)
        example = self._reader.example(row.given, row.number)
        coded = tuple((text, self._option(example, row, text)) for text in options)
        return replace(row, options=coded, right=right, reference=options[right])

    def _right(self, row: ScoredRow, options: Sequence[str]) -> int:
        column = self._own[ANSWER]
        value = row.given.get(column)
        value = value.item() if getattr(value, "shape", None) == () else value
        value = row.reference if is_nothing(value) else value
        if isinstance(value, str) and value in options:
            return options.index(value)
        labels = row.given.get(self._own[CHOICES])
        labels = list(labels.get("label", ())) if isinstance(labels, Mapping) else []
        if value in labels:
            return labels.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
            return value
        if is_nothing(value):
            raise _Missing("it has no reference")
        raise _Missing(f"its reference {value!r:.40} is none of its {len(options)} choices")

    def _option(self, example: Any, row: ScoredRow, option: str) -> Mapping[str, Any]:
        """The tokens of the prompt with an option, and labels on those of the option without its end token."""
        if isinstance(example, Chat):
            answered = (*_before_last_turn(example), {"role": "assistant", "content": option})
            before, turn = self._turn(replace(example, messages=answered, weights=(1.0,) * len(answered)), row.number)
            coded = encode(self._tokenizer, before + turn, [Span(len(before), len(before + turn))], special=False)
        else:
            prompt = example.prompt if isinstance(example, Pair) else row.prompt
            coded = encode(self._tokenizer, prompt + option, [Span(len(prompt), len(prompt + option))])
        ids, labels = list(coded.input_ids), list(coded.labels)
        ends = self._usual_ends | self.ends | self._special
        learned = [n for n, label in enumerate(labels) if label != IGNORED_LABEL and label not in ends]
        first_end = next((n for n, label in enumerate(labels) if label != IGNORED_LABEL and label in ends), len(ids))
        last = max((n + 1 for n in learned if n < first_end), default=first_end)
        return {"input_ids": ids[:last], "labels": labels[:last]}


def _before_last_turn(chat: Chat) -> tuple[Mapping[str, Any], ...]:
    """The messages before the last turn of the assistant; all of them if there is none."""
    place = max((number for number, item in enumerate(chat.messages) if item["role"] == "assistant"), default=None)
    return chat.messages if place is None else chat.messages[:place]


def _asked(chat: Chat) -> str:
    """The text that the last turn of the assistant answers."""
    content = next((item.get("content") for item in reversed(_before_last_turn(chat))), "")
    return content if isinstance(content, str) else ""


def _check_tokens(model: nn.Module, rows: Sequence[ScoredRow], inputs: ModelInputs) -> None:
    """Refuses rows that do not fit the model."""
    size = getattr(embedding_of(base_of(model)), "num_embeddings", None)
    vocabulary, causal = size if isinstance(size, int) else None, is_causal(model)
    for row in rows:
        prompt = {"input_ids": list(row.prompt_ids)} if row.prompt_ids else {}
        for tokens in (prompt, *(coded for _, coded in row.options)):
            if tokens:
                check_row(tokens, row.number, vocabulary=vocabulary, causal=causal)
        for coded in (row.coded, *row.other_parts):
            if coded:
                check_row(coded, row.number, vocabulary=vocabulary, causal=causal, classes=inputs.classes)
