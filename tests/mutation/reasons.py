"""Why some faults cannot be noticed: the reasons in ``reasons/*.toml``, by file and fault."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.mutation.mutants import Mutant

FILES = Path(__file__).parent / "reasons"

Reason = tuple[str, str]
"""A kind of `KINDS`, and a sentence."""
KINDS = ("equivalent", "cost", "elsewhere")
"""No result changes; only time or memory does; what notices it is no quick test (the sentence names what does)."""


@cache
def reasons() -> Mapping[tuple[str, str], Reason]:
    """All reasons, by the path and the text of the fault (without its line).

    Raises:
        ValueError: an entry is not complete, or of another kind.
    """
    found: dict[tuple[str, str], Reason] = {}
    for file in sorted(FILES.glob("*.toml")):
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["fault"]:
            if set(entry) != {"file", "what", "kind", "why"} or entry["kind"] not in KINDS:
                raise ValueError(f"{file.name}: {entry} needs file, what, why and a kind of {', '.join(KINDS)}")
            found[entry["file"], entry["what"]] = entry["kind"], entry["why"]
    return found


def reason_of(mutant: Mutant) -> Reason | None:
    """Why no test notices a fault, if that is known."""
    return reasons().get((mutant.path, mutant.text))
