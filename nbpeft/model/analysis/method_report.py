"""``MethodReport``: what ``check_method`` found, one entry for each check on each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from nbpeft.display.blocks import Block, Table, card
from nbpeft.display.numbers import plural
from nbpeft.display.shown import Shown
from nbpeft.errors import MethodCheckError, few

Status = Literal["ok", "refused", "failed", "skipped"]
_STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class MethodCheck:
    """One check of a method on one model.

    Attributes:
        check: name of the check.
        model: the model, or the kind of its layer.
        status: ``ok``; ``refused`` if the method or the engine rejected it with a reason, which is allowed for this
            check; ``failed``; or ``skipped``.
        reason: one line; empty if it is ``ok``.
    """

    check: str
    model: str
    status: Status
    reason: str = ""


@dataclass(frozen=True, repr=False)
class MethodReport(Shown):
    """What ``check_method`` found.

    Attributes:
        method: display name of the method.
        checks: the checks in the order in which they ran.
    """

    method: str
    checks: tuple[MethodCheck, ...]

    @property
    def failures(self) -> tuple[MethodCheck, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Raises one error that names all checks that failed.

        Raises:
            MethodCheckError: a check failed; ``details["failures"]`` has the checks.
        """
        if self.failures:
            found = [f"{check} on {models}: {reason}" for check, models, _, reason in _rows(self.failures)]
            message = f"{self.method} fails {plural(len(found), 'check')}: {few(found, quoted=False)}"
            raise MethodCheckError(message, failures=self.failures)

    def view(self) -> Block:
        """Returns the checks as a table."""
        rows = tuple(
            (check, status, f"{models}: {reason}" if reason else models)
            for check, models, status, reason in _rows(self.checks)
        )
        return card(self._title(), Table(("Check", "Result", "Models"), rows, prose=(2,)))

    def _title(self) -> str:
        counts = Counter(check.status for check in self.checks)
        return f"{self.method}: {', '.join(f'{counts[status]} {status}' for status in _STATUSES if counts[status])}"

    def __str__(self) -> str:
        rows = [(check, status, models, reason) for check, models, status, reason in _rows(self.checks)]
        names, states = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
        lines = [
            f"  {check:<{names}}  {status:<{states}}  {models}{f': {reason}' if reason else ''}"
            for check, status, models, reason in rows
        ]
        return "\n".join([self._title(), *lines])


def _rows(checks: Iterable[MethodCheck]) -> list[tuple[str, str, Status, str]]:
    """Check, models, status and reason of each row of the table: models with the same result share a row."""
    models: dict[str, dict[tuple[Status, str], list[str]]] = {}
    for check in checks:
        models.setdefault(check.check, {}).setdefault((check.status, check.reason), []).append(check.model)
    return [
        (check, ", ".join(names), status, reason)
        for check, results in models.items()
        for (status, reason), names in results.items()
    ]
