"""The table of methods: what each costs on a model, what it supports, and when to choose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbpeft._util.optional import needs
from nbpeft.display.blocks import Card, Cell, Table, Text, bold, card, dim, line, notes
from nbpeft.display.models import with_notes
from nbpeft.display.numbers import NONE, count, size
from nbpeft.session.results.base import Result

if TYPE_CHECKING:
    from nbpeft.model.analysis.method_facts import MethodFacts

_YES, _NO = "✓", NONE
_CAN = ("Merge", "Swap", "4‑bit", "Rows")
_LEGEND = (
    "Merge: into the weights. Swap: another one in its place while the model runs. 4‑bit: on quantized layers (slow: "
    "it needs the whole weight at each call). Rows: several of them in a batch in one pass; others one after the other."
)
_TIME = "The time of a step depends on the machine: train a few steps of each."


@dataclass(frozen=True)
class MethodCost:
    """The cost of a method on a model.

    Attributes:
        parameter_count: number of trained parameters.
        byte_count: size of the adapter in bytes, including shared tensors.
        training_bytes: size of gradients and AdamW's two moments in bytes.
        peak_bytes: peak memory of a training step in bytes; None if it was not requested.
        refusal: why the method cannot be used on the model with these settings; empty if it can.
    """

    parameter_count: int = 0
    byte_count: int = 0
    training_bytes: int = 0
    peak_bytes: int | None = None
    refusal: str = ""


@dataclass(frozen=True)
class MethodRow:
    """One method in the table.

    Attributes:
        label: display name.
        written: the value of ``--method``, or the field that selects it.
        cost: cost on the model; None without a model.
        facts: what the method supports; None for a method that does not adapt layers.
        when: when to choose it.
        paper: reference.
    """

    label: str
    written: str
    cost: MethodCost | None
    facts: MethodFacts | None
    when: str
    paper: str

    @property
    def can(self) -> tuple[str, ...]:
        """One cell for each of Merge, Swap, 4‑bit and Rows."""
        facts = self.facts
        if facts is None:
            return (_NO,) * len(_CAN)
        signs = tuple(_YES if able else _NO for able in (facts.merges, facts.swaps, facts.quantized, facts.serves_rows))
        slow = facts.quantized and facts.dequantizes
        return (*signs[:2], "slow" if slow else signs[2], signs[3])


@dataclass(frozen=True, repr=False)
class MethodsResult(Result):
    """All methods, those with the fewest parameters first.

    Attributes:
        model_name: the notebook variable of the model; empty if none was given.
        rows: one per method.
        settings: the config fields used for the table, as text.
        forecast: whether the peak of a training step was requested.
        notes: messages for the user.
    """

    model_name: str
    rows: tuple[MethodRow, ...]
    settings: str = ""
    forecast: bool = False
    notes: tuple[str, ...] = ()

    @property
    def _costs(self) -> tuple[str, ...]:
        """Titles of the columns with costs."""
        if not self.model_name:
            return ()
        return ("Parameters", "To train", *(("Peak",) if self.forecast else ()))

    def __str__(self) -> str:
        from nbpeft.display.text import columns

        rows = [
            (row.label, row.written, *_figures(row, self._costs), *row.can, _why(row), row.paper) for row in self.rows
        ]
        head = ("Method", "", *self._costs, *_CAN, "When to choose it", "Paper")
        return with_notes(f"{self._title}\n{columns((head, *rows))}\n{_LEGEND} {_TIME}", self.notes)

    @property
    def _title(self) -> str:
        return f"{len(self.rows)} methods" + (f" on {self.model_name}, with {self.settings}" if self.model_name else "")

    def view(self) -> Card:
        """Shows all methods as a table."""
        rows = tuple(
            (
                (bold(row.label), Text(row.written, "dim", wrap="names")),
                *_figures(row, self._costs),
                *(Text(sign, "" if sign == _YES else "dim") for sign in row.can),
                _reason(row),
            )
            for row in self.rows
        )
        count_of_figures = len(self._costs)
        table = Table(
            ("Method", *self._costs, *_CAN, "When to choose it"), rows, right=tuple(range(1, 1 + count_of_figures))
        )
        added = "To train: the adapter with gradients and AdamW's moments." if self.model_name else ""
        return card(
            self._title,
            table,
            line(dim(" ".join(filter(None, (added, _LEGEND, _TIME))))),
            notes(self.notes),
        )

    def to_dataframe(self) -> Any:
        """Returns the methods as a pandas DataFrame with one row each.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        with needs("pandas", "to_dataframe()"):
            import pandas
        rows = []
        for row in self.rows:
            facts = {name: None if row.facts is None else getattr(row.facts, name) for name in _FACTS}
            costs = vars(row.cost) if row.cost is not None else {}
            rows.append(
                {"method": row.label, "written": row.written, **costs, **facts, "when": row.when, "paper": row.paper}
            )
        return pandas.DataFrame(rows)


_FACTS = ("merges", "swaps", "quantized", "dequantizes", "serves_rows")


def _figures(row: MethodRow, titles: tuple[str, ...]) -> tuple[str, ...]:
    cost = row.cost
    if cost is None or cost.refusal:
        return (NONE,) * len(titles)
    found = (count(cost.parameter_count), size(cost.byte_count + cost.training_bytes), size(cost.peak_bytes))
    return found[: len(titles)]


def _why(row: MethodRow) -> str:
    """Returns when to choose the method, or why it cannot be used on the model."""
    return f"not as it is: {row.cost.refusal}" if row.cost is not None and row.cost.refusal else row.when


def _reason(row: MethodRow) -> Cell:
    shown = urlsplit(row.paper).hostname or row.paper  # a complete URL has no position for a line break
    paper = Text(shown, "dim", href=_address(row.paper)) if row.paper else ""
    refused = row.cost is not None and row.cost.refusal
    first = Text(_why(row), "warning") if refused else Text(row.when)
    return (first, paper) if paper else first


def _address(paper: str) -> str:
    return paper.replace("arXiv:", "https://arxiv.org/abs/") if paper.startswith("arXiv:") else paper
