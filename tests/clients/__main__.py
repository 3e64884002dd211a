"""Runs the cases that take minutes with PEFT and with nbpeft by its name, and prints what is equal.

python -m tests.clients                       # all of them
python -m tests.clients pipelines_whole
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.clients.client_run import CASES
from tests.clients.test_clients import PACKAGES, close, results

LONG = ("pipelines",)
"""Starts of the names of cases that run here alone."""


def main(*chosen: str) -> int:
    """Runs cases and prints a row for each, and what differs.

    Returns:
        1 if anything differs, else 0.
    """
    failed = 0
    print("| case | results | equal | what |\n|---|---:|---:|---|", flush=True)
    for name in chosen or [name for name in CASES if name.startswith(LONG)]:
        client = "diffusers" if name.startswith(LONG) else next(one for one in PACKAGES if name.startswith(one))
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = (results(client, library, [name], Path(folder)) for library in ("peft", "as-peft"))
        pairs = _pairs(theirs[name], ours[name])
        different = [(one, other) for one, other in pairs if not close(one, other)]
        failed |= bool(different)
        what = (CASES[name].__doc__ or "").strip().splitlines()[0]
        print(f"| {name} | {len(pairs)} | {len(pairs) - len(different)} | {what} |", flush=True)
        for one, other in different[:5]:
            print(f"    with PEFT: {one!s:.500}\n    with nbpeft: {other!s:.500}", flush=True)
    return failed


def _pairs(theirs: Any, ours: Any) -> list[tuple[Any, Any]]:
    """Results next to each other; one pair if a side failed or they are not equally many."""
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [*zip(theirs, ours, strict=True)]
    return [(["failed", theirs], ours)] if isinstance(theirs, str) else [(theirs, ours)]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
