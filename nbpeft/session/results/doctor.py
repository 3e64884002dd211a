"""The report of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Card, Table, Text, card
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import Result


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        found: its version or state, or the empty string if it is missing.
        problem: what is wrong, or the empty string.
        remedy: how to fix the problem.
        optional: whether everything else works without it.
        note: a remark if nothing is wrong.
    """

    name: str
    found: str
    problem: str = ""
    remedy: str = ""
    optional: bool = False
    note: str = ""

    @property
    def advice(self) -> str:
        """The problem and its remedy, or the note."""
        return f"{self.problem}: {self.remedy}" if self.problem and self.remedy else self.problem or self.note


@dataclass(frozen=True, repr=False)
class DoctorReport(Result):
    """The installed components and their problems."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.problem)

    def with_checks(self, *more: Check) -> DoctorReport:
        """Returns the report with additional lines."""
        return DoctorReport((*self.checks, *more))

    @property
    def verdict(self) -> str:
        """The result as text, e.g. ``2 problems found``."""
        return f"{plural(len(self.problems), 'problem')} found" if self.problems else "everything is in order"

    def __str__(self) -> str:
        from nbpeft.display.text import columns

        rows = [(check.name, check.found or "not installed", check.advice) for check in self.checks]
        return f"nbpeft doctor: {self.verdict}\n{columns(rows)}"

    def view(self) -> Card:
        rows = tuple(
            (
                check.name,
                check.found or "not installed",
                Text(check.advice, "error" if check.problem and not check.optional else "dim"),
            )
            for check in self.checks
        )
        return card(f"nbpeft doctor: {self.verdict}", Table(("What", "Found", "Remark"), rows))
