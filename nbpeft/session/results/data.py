"""The result of inspecting training data: rows as the model will read them, and the lengths of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import (
    Block,
    Card,
    Figure,
    Figures,
    Histogram,
    Text,
    Tokens,
    TokenSpan,
    card,
    dim,
    line,
    notes,
)
from nbpeft.display.numbers import count, plural, short_count
from nbpeft.session.results.base import NotedResult
from nbpeft.session.results.comparing import system_block, system_line

if TYPE_CHECKING:
    from nbpeft.training.data import DataSummary
    from nbpeft.training.data.summary import RowSummary


@dataclass(frozen=True, repr=False)
class DataResult(NotedResult):
    """The data that a training would read.

    Attributes:
        name: the user's name for the data.
        summary: counts, lengths and some rows.
    """

    name: str
    summary: DataSummary

    def __str__(self) -> str:
        summary = self.summary
        learned = f"{_percent(summary.learned_count, summary.token_count)} of them learned"
        if summary.compared_count:
            learned += f", {_percent(summary.compared_count, summary.token_count)} compared"
        parts = [plural(summary.row_count, "row")]
        if summary.longest:
            parts.append(plural(summary.token_count, "token"))
            parts += [] if summary.has_labels else [learned]
            parts.append(f"the longest row has {summary.longest}")
        system = [system_line(self._system)] if self._system else []
        head = [f"{self.name} ({summary.form}): {', '.join(parts)}", *system, _answer_words(summary)]
        return "\n".join(filter(None, [*head, *(f"note: {note}" for note in self.notes)]))

    def view(self) -> Card:
        system = self._system
        return card(
            f"{self.name} · training data",
            self._figures(),
            self._lengths(),
            system_block(system_line(system)) if system else None,
            self._answers(),
            notes(self.notes),
            self._key(),
            *(part for row in self.summary.rows for part in self._row(row)),
            aside=self.summary.form,
        )

    @property
    def _system(self) -> str:
        """The system prompt of all rows; empty if there is none."""
        return (self.summary.format.system if self.summary.format is not None else "") or ""

    def _figures(self) -> Figures:
        summary = self.summary
        learned = Figure("learned", _percent(summary.learned_count, summary.token_count), width=56)
        compared = Figure("compared", _percent(summary.compared_count, summary.token_count), width=64)
        figures = [Figure("rows", count(summary.row_count), width=44)]
        if summary.longest:
            figures += [
                Figure("tokens", short_count(summary.token_count), width=60),
                *([] if summary.has_labels else [learned]),
                *([compared] if summary.compared_count else []),
                Figure("median length", count(summary.median), width=84),
                Figure("longest row", count(summary.longest), width=72),
            ]
        if summary.cut_rows:
            figures.append(Figure("rows cut", _percent(summary.cut_rows, _all_rows(summary)), width=52))
        if summary.split_rows:
            figures.append(Figure("rows split", count(summary.split_rows), width=52))
        if summary.left_out_count:
            figures.append(Figure("left out", count(summary.left_out_count), width=52))
        return Figures(tuple(figures))

    def _lengths(self) -> tuple[Block, ...]:
        summary = self.summary
        if not summary.longest:
            return ()
        label = "" if summary.limit is None else f"max_length {count(summary.limit)}"
        chart = Histogram(summary.bins, summary.limit if summary.cut_rows else None, label if summary.cut_rows else "")
        fits = f"all rows are within {label}" if label and not summary.cut_rows else ""
        return chart, line(dim(fits))

    def _answers(self) -> Block | None:
        words = _answer_words(self.summary)
        return line(Text(words, wrap="as is")) if words else None

    def _row(self, row: RowSummary) -> tuple[Block, ...]:
        parts = [f"row {row.number}", *([row.part] if row.part else [])]
        parts += [plural(row.token_count, "token")] if row.token_count or row.missing else []
        if row.missing:
            parts.append(f"left out: {row.missing}")
        elif row.label:
            parts.append(f"label {row.label}")
        elif row.token_count:
            parts.append(f"{count(row.learned_count)} learned")
        if row.cut_count:
            parts.append(f"{plural(row.cut_count, 'token')} cut")
        title = " · ".join(parts)
        if not row.spans:  # it could not be read
            return (line(dim(title)),)
        if row.target:
            compared = f" · {count(row.compared_count)} compared" if row.compared_count and not row.missing else ""
            return Tokens(title, row.spans), Tokens(f"{row.target_title}{compared}", row.target)
        return (Tokens(title, row.spans),)

    def _key(self) -> Tokens:
        rows = self.summary.rows if self.summary.longest else ()
        spans = [span for row in rows for span in (*row.spans, *row.target)]
        kinds = (
            TokenSpan("learned", learned=True) if any(span.learned for span in spans) else None,
            TokenSpan("compared", compared=True) if any(span.compared for span in spans) else None,
            TokenSpan("read, not learned")
            if any(not (span.learned or span.compared or span.cut) for span in spans)
            else None,
            TokenSpan("special token", special=True) if any(span.special for span in spans) else None,
            TokenSpan("cut off", cut=True) if any(span.cut for span in spans) else None,
        )
        spaced = [part for kind in kinds if kind is not None for part in (TokenSpan("   "), kind)]
        return Tokens("", tuple(spaced[1:]), framed=False)


def notes_of(summary: DataSummary) -> tuple[str, ...]:
    """Returns messages for the user about the rows, one per fact."""
    from nbpeft.training.data.answers import odd_answers  # here, as the package imports torch
    from nbpeft.training.data.tokenized import split_line

    messages = []
    if summary.partial:
        messages.append(f"these are the first {count(_all_rows(summary))} rows of a stream")
    if summary.cut_rows:
        messages.append(
            f"{count(summary.cut_rows)} of {plural(_all_rows(summary), 'row')} cut to {count(summary.limit or 0)} "
            f"tokens: {plural(summary.cut_tokens, 'token')} are not read"
        )
    if summary.split_rows:
        messages.append(split_line(summary.split_rows, summary.split_parts))
    if summary.left_out_count:
        messages.append(f"{plural(summary.left_out_count, 'row')} left out: {summary.left_out}")
    messages += [*summary.unused, *odd_answers(summary.answers)]
    if summary.unlabelled:
        names = {"prompt": summary.unlabelled, "completion": "label"}
        messages.append(
            f"a language model is trained on the text without its label: columns={names} trains it to answer with the "
            "label; a classifier uses the labels as they are"
        )
    if summary.for_template:
        messages.append(
            "no chat template is applied to prompts and completions, though the tokenizer has one: "
            f"columns={dict(summary.for_template)} applies it"
        )
    if summary.repeated:
        messages.append(
            f"{count(summary.repeated)} of {plural(summary.row_count, 'row')} "
            f"{'is equal to an earlier one' if summary.repeated == 1 else 'are equal to earlier ones'}: if rows are "
            f"held out for evaluation, {summary.grouping}"
        )
    if summary.longest and not summary.learned_count:
        messages.append("no token of these rows is learned")
    return tuple(messages)


def _answer_words(summary: DataSummary) -> str:
    """The distinct answers or labels, if they are few."""
    from nbpeft.training.data.answers import listed_answers

    what = "label" if summary.has_labels else "answer"
    listed = listed_answers(summary.answers)
    return f"{count(len(summary.answers))} different {what}s: {listed}" if len(summary.answers) > 1 else ""


def _all_rows(summary: DataSummary) -> int:
    return summary.row_count + summary.left_out_count


def _percent(part: int, whole: int) -> str:
    """Returns e.g. ``36.4 %``."""
    return f"{100 * part / whole:.3g} %" if whole else "0 %"
