"""The table of methods: what each costs on a model, what it supports, and when to choose it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbpeft._util.optional import needs
from nbpeft.display.blocks import Card, Cell, Table, Text, bold, card, dim, line, notes
from nbpeft.display.numbers import NONE, count, size
from nbpeft.errors import ConfigError, did_you_mean
from nbpeft.session.results.base import NotedResult

if TYPE_CHECKING:
    from nbpeft.model.analysis.method_facts import MethodFacts

OF_COSTS = ("parameters", "memory", "peak")
SORTS = ("group", "name", *OF_COSTS)
"""Sort orders of the table."""
_YES, _NO = "✓", NONE
_CAN = ("Merge", "Swap", "4‑bit", "Rows")
_LEGEND = (
    "Merge: can be merged into the weights. Swap: can be replaced by another adapter without recompiling the model. "
    "4‑bit: works on quantized layers (slow: each call dequantizes the whole weight). Rows: one forward pass serves "
    "different adapters in different rows of a batch."
)
_TIME = "The time of a step depends on the machine: train a few steps of each method to compare."


@dataclass(frozen=True)
class MethodCost:
    """The cost of a method on a model.

    Attributes:
        parameter_count: number of trained parameters.
        byte_count: size of the adapter in bytes, including shared tensors.
        training_bytes: size of gradients and AdamW's two moments in bytes.
        peak_bytes: peak memory of a training step in bytes; None if it was not requested.
        refusal: why the method cannot be used on the model with these settings; empty if it can.
        settings: fields whose defaults do not divide the sizes of the model's layers, with the values used instead.
    """

    parameter_count: int = 0
    byte_count: int = 0
    training_bytes: int = 0
    peak_bytes: int | None = None
    refusal: str = ""
    settings: str = ""


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
        group: heading of its group.
    """

    label: str
    written: str
    cost: MethodCost | None
    facts: MethodFacts | None
    when: str
    paper: str
    group: str = ""

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
class MethodsResult(NotedResult):
    """All methods.

    Attributes:
        model_name: the notebook variable of the model; empty if none was given.
        rows: one per method.
        settings: the config fields used for the table, as text.
        forecast: whether the peak of a training step was requested.
        sort: the order of the rows, one of ``SORTS``.
    """

    model_name: str
    rows: tuple[MethodRow, ...]
    settings: str = ""
    forecast: bool = False
    sort: str = "group"

    @property
    def _costs(self) -> tuple[str, ...]:
        """Titles of the columns with costs."""
        if not self.model_name:
            return ()
        return ("Parameters", "To train", *(("Peak",) if self.forecast else ()))

    def _what(self) -> str:
        from nbpeft.display.text import columns

        rows: list[tuple[str, ...]] = []
        for row, heading in self._headed():
            rows += [(heading.upper(),)] if heading else []
            rows.append((row.label, row.written, *_figures(row, self._costs), *row.can, _why(row), row.paper))
        head = ("Method", "", *self._costs, *_CAN, "When to choose it", "Paper")
        return f"{self._title}\n{columns((head, *rows))}\n{_LEGEND} {_TIME}"

    @property
    def _title(self) -> str:
        return f"{len(self.rows)} methods" + (f" on {self.model_name}, with {self.settings}" if self.model_name else "")

    def view(self) -> Card:
        head = ("Method", *self._costs, *_CAN, "When to choose it")
        rows: list[tuple[Cell, ...]] = []
        for row, heading in self._headed():
            rows += [(Text(heading, "accent"), *[""] * (len(head) - 1))] if heading else []
            rows.append(
                (
                    (bold(row.label), Text(row.written, "dim", wrap="names")),
                    *_figures(row, self._costs),
                    *(Text(sign, "" if sign == _YES else "dim") for sign in row.can),
                    _reason(row),
                )
            )
        figures = tuple(range(1, 1 + len(self._costs)))
        table = Table(head, tuple(rows), right=figures, prose=(len(head) - 1,))
        added = "To train: the adapter with gradients and AdamW's moments." if self.model_name else ""
        return card(self._title, table, line(dim(" ".join(filter(None, (added, _LEGEND, _TIME))))), notes(self.notes))

    def _headed(self) -> Iterable[tuple[MethodRow, str]]:
        """Yields each row with the heading above it; empty for a row in the group of the one before."""
        before = ""
        for row in self.rows:
            heading = row.group if self.sort == "group" and row.group != before else ""
            before = row.group
            yield row, heading

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
                {
                    **{"method": row.label, "group": row.group, "written": row.written, **costs, **facts},
                    **{"when": row.when, "paper": row.paper},
                }
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
    """Returns when to choose the method, with which settings on the model, and what it needs before it can be used."""
    if row.cost is None:
        return row.when
    needed = row.cost.refusal and f"not with these defaults: {row.cost.refusal}"
    return "; ".join(filter(None, (row.when, row.cost.settings and f"here with {row.cost.settings}", needed)))


def _reason(row: MethodRow) -> Cell:
    paper = Text(_short_reference(row.paper), "dim", row.paper, "names", _address(row.paper)) if row.paper else ""
    refused = row.cost is not None and row.cost.refusal
    first = Text(_why(row), "warning" if refused else "")
    return (first, paper) if paper else first


def _short_reference(paper: str) -> str:
    """Returns a reference as it is cited: ``arXiv:2106.09685``, ``doi:10.1609/…``, or the site of any other URL."""
    url = urlsplit(paper)
    if url.hostname == "doi.org":
        return f"doi:{url.path.lstrip('/')}"
    return f"paper on {url.hostname}" if url.hostname else paper


def check_sort(sort: str) -> None:
    """Checks a sort order.

    Raises:
        ConfigError: there is no such order.
    """
    if sort not in SORTS:
        raise ConfigError(f"methods cannot be sorted by {sort!r:.60}.{did_you_mean(sort, SORTS)}", field="sort")


def sorted_rows(rows: Iterable[MethodRow], sort: str) -> tuple[MethodRow, ...]:
    """Returns the rows in one of the orders ``SORTS``; methods whose cost is unknown come last."""
    from nbpeft.model.analysis.method_facts import COMMON, GROUPS

    def cost(row: MethodRow) -> int:
        if row.cost is None or row.cost.refusal:
            return 1 << 60
        if sort == "peak":
            return row.cost.peak_bytes or 0
        return row.cost.byte_count + row.cost.training_bytes if sort == "memory" else row.cost.parameter_count

    place = {label: number for number, label in enumerate(COMMON)}
    keys: dict[str, Callable[[MethodRow], Any]] = {
        "group": lambda row: (GROUPS.index(row.group), place.get(row.label, len(place))),
        "name": lambda row: row.label.lower(),
    }
    return tuple(sorted(rows, key=keys.get(sort, cost)))


def _address(paper: str) -> str:
    return paper.replace("arXiv:", "https://arxiv.org/abs/") if paper.startswith("arXiv:") else paper
