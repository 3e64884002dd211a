"""What looking at training data gives: rows as the model will read them, and how long all of them are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbpeft.display.blocks import Block, Card, Figure, Figures, Histogram, Tokens, TokenSpan, card, dim, line, notes
from nbpeft.display.numbers import count, plural, short_count
from nbpeft.session.results.base import Result

if TYPE_CHECKING:
    from nbpeft.training.data import DataSummary
    from nbpeft.training.data.summary import RowSummary


@dataclass(frozen=True, repr=False)
class DataResult(Result):
    """What a training would read.

    Attributes:
        name: what a person calls the data.
        summary: counts, lengths and some rows.
        notes: what a person should know, one each.
    """

    name: str
    summary: DataSummary
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = self.summary
        learned = f"{_percent(found.learned_count, found.token_count)} of them learned"
        parts = [
            plural(found.row_count, "row"),
            plural(found.token_count, "token"),
            *([] if found.has_labels else [learned]),
            f"the longest row has {found.longest}",
        ]
        return "\n".join([f"{self.name} ({found.form}): {', '.join(parts)}", *(f"note: {note}" for note in self.notes)])

    def view(self) -> Card:
        """Counts, a histogram of lengths, and rows with what is learned marked."""
        return card(
            f"{self.name} · training data",
            self._figures(),
            self._lengths(),
            notes(self.notes),
            self._key(),
            *(part for row in self.summary.rows for part in self._row(row)),
            aside=self.summary.form,
        )

    def _figures(self) -> Figures:
        found = self.summary
        learned = Figure("learned", _percent(found.learned_count, found.token_count), width=56)
        figures = [
            Figure("rows", count(found.row_count), width=44),
            Figure("tokens", short_count(found.token_count), width=60),
            *([] if found.has_labels else [learned]),
            Figure("median length", count(found.median), width=84),
            Figure("longest row", count(found.longest), width=72),
        ]
        if found.cut_rows:
            figures.append(Figure("rows cut", _percent(found.cut_rows, _all_rows(found)), width=52))
        if found.left_out_count:
            figures.append(Figure("left out", count(found.left_out_count), width=52))
        return Figures(tuple(figures))

    def _lengths(self) -> tuple[Block, ...]:
        found = self.summary
        label = "" if found.limit is None else f"max_length {count(found.limit)}"
        chart = Histogram(found.bins, found.limit if found.cut_rows else None, label if found.cut_rows else "")
        fits = f"all rows are within {label}" if label and not found.cut_rows else ""
        return chart, line(dim(fits))

    def _row(self, row: RowSummary) -> tuple[Block, ...]:
        parts = [f"row {row.number}", plural(row.token_count, "token")]
        if row.missing:
            parts.append(f"left out: {row.missing}")
        elif row.label:
            parts.append(f"label {row.label}")
        else:
            parts.append(f"{count(row.learned_count)} learned")
        if row.cut_count:
            parts.append(f"{plural(row.cut_count, 'token')} cut")
        title = " · ".join(parts)
        if row.target:
            return Tokens(title, row.spans), Tokens("to be answered", row.target)
        return (Tokens(title, row.spans),)

    def _key(self) -> Tokens:
        spans = [span for row in self.summary.rows for span in (*row.spans, *row.target)]
        kinds = (
            TokenSpan("learned", learned=True) if any(span.learned for span in spans) else None,
            TokenSpan("read, not learned") if any(not (span.learned or span.cut) for span in spans) else None,
            TokenSpan("special token", special=True) if any(span.special for span in spans) else None,
            TokenSpan("cut off", cut=True) if any(span.cut for span in spans) else None,
        )
        spaced = [part for kind in kinds if kind is not None for part in (TokenSpan("   "), kind)]
        return Tokens("", tuple(spaced[1:]), framed=False)


def notes_of(found: DataSummary) -> tuple[str, ...]:
    """What a person should know of rows, one each."""
    said = []
    if found.partial:
        said.append(f"these are the first {count(_all_rows(found))} rows of a stream")
    if found.cut_rows:
        said.append(
            f"{count(found.cut_rows)} of {plural(_all_rows(found), 'row')} cut to {count(found.limit or 0)} tokens: "
            f"{plural(found.cut_tokens, 'token')} are not read"
        )
    if found.left_out_count:
        said.append(f"{plural(found.left_out_count, 'row')} left out: {found.left_out}")
    said += found.unused
    if found.unused_label:
        said.append(
            "a language model is trained on the text, whatever its label: columns={'prompt': 'text', 'completion': "
            "'label'} makes it answer with the label, and a classifier learns it as it is"
        )
    if found.row_count and not found.learned_count:
        said.append("no token of these rows is learned")
    return tuple(said)


def _all_rows(found: DataSummary) -> int:
    return found.row_count + found.left_out_count


def _percent(part: int, whole: int) -> str:
    """``36.4 %``."""
    return f"{100 * part / whole:.3g} %" if whole else "0 %"
