"""What the doctor found."""

from __future__ import annotations

from dataclasses import dataclass

from nbpeft.display.blocks import Card, Table, Text, card
from nbpeft.display.numbers import plural
from nbpeft.session.results.base import Result


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        found: its version or state, or the empty string when it is not there.
        problem: what is wrong, or the empty string.
        remedy: what to do about it.
        optional: whether everything else works without it.
        note: what is good to know where nothing is wrong.
    """

    name: str
    found: str
    problem: str = ""
    remedy: str = ""
    optional: bool = False
    note: str = ""

    @property
    def advice(self) -> str:
        """What is wrong and what to do about it, or the note."""
        return f"{self.problem}: {self.remedy}" if self.problem and self.remedy else self.problem or self.note


@dataclass(frozen=True, repr=False)
class DoctorReport(Result):
    """What is installed and what is wrong with it."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.problem)

    def with_checks(self, *more: Check) -> DoctorReport:
        """The report with more lines."""
        return DoctorReport((*self.checks, *more))

    @property
    def verdict(self) -> str:
        """``2 problems found``."""
        return f"{plural(len(self.problems), 'problem')} found" if self.problems else "everything is in order"

    def __str__(self) -> str:
        from nbpeft.display.text import columns

        rows = [(check.name, check.found or "not installed", check.advice) for check in self.checks]
        return f"nbpeft doctor: {self.verdict}\n{columns(rows)}"

    def view(self) -> Card:
        """One row a check."""
        rows = tuple(
            (
                check.name,
                check.found or "not installed",
                Text(check.advice, "error" if check.problem and not check.optional else "dim"),
            )
            for check in self.checks
        )
        return card(f"nbpeft doctor: {self.verdict}", Table(("What", "Found", "Remark"), rows))
