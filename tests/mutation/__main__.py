"""The command line: ``python -m tests.mutation``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from tests.mutation.mutants import Mutant, draw, mutants_of
from tests.mutation.reach import ROOT, Reached, measure

SCOPE = (
    "nbpeft/engine",
    "nbpeft/checkpoint",
    "nbpeft/losses",
    "nbpeft/training/data",
    "nbpeft/training/disk",
    "nbpeft/training/monitor",
    "nbpeft/model/saving",
)
FIRST = 25
"""Tests that run before all others of a mutant: most are killed by one of them."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        mutant: which.
        what: killed by a test, survived all that reach it, or reached by none.
        killer: the test that failed, or why it was killed without one.
        tests: how many tests ran, at most.
        reaching: how many reach it.
    """

    mutant: Mutant
    what: Literal["killed", "survived", "not reached"]
    killer: str = ""
    tests: int = 0
    reaching: int = 0


def main(given: list[str] | None = None) -> int:
    """Draws faults, runs the tests that reach them, and prints a table and those that survived."""
    options = parser().parse_args(given)
    if options.reach:
        return measure()
    chosen = draw(list(mutants(options.only)), options.number, options.seed, read)
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from tests.mutation import killing

    reached = None if options.tests else Reached()
    if reached is not None:
        for path in sorted({mutant.path for mutant in chosen}):
            reached.check_is_current(path)
    killing.import_in_advance()
    verdicts = []
    for mutant in chosen:
        verdict = judge(mutant, reached, options.tests, options.seconds)
        verdicts.append(verdict)
        print(
            f"{verdict.what:<12} {mutant}  [{verdict.killer or f'{verdict.tests} of {verdict.reaching}'}]", flush=True
        )
    unsure = killers_that_fail_alone(verdicts)
    print("\n".join(["", *table(verdicts)]))
    for killer in unsure:
        print(f"fails without a fault, too: {killer}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tests.mutation", description="Which seeded faults the tests notice.")
    made.add_argument("--reach", action="store_true", help="measure which tests reach which line, and end")
    made.add_argument("--number", type=int, default=60, help="how many faults (60)")
    made.add_argument("--seed", type=int, default=0, help="another draws others (0)")
    made.add_argument("--seconds", type=float, default=60, help="of processor time for the tests of one fault (60)")
    made.add_argument("--only", default="", metavar="PATH[:LINE]", help="only faults in files whose path ends so")
    made.add_argument("--tests", nargs="+", metavar="TEST", help="these tests, instead of those that reach the fault")
    made.add_argument("--list", action="store_true", help="show the faults, and run nothing")
    return made


@cache
def read(path: str) -> str:
    """The source of a file below the root."""
    return (ROOT / path).read_text(encoding="utf-8")


def mutants(only: str) -> Iterator[Mutant]:
    """All faults in scope, or those of one file or one line."""
    ending, _, line = only.partition(":")
    for folder in SCOPE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            if path.endswith(ending):
                yield from (each for each in mutants_of(path, read(path)) if not line or each.lines[0] == int(line))


def judge(mutant: Mutant, reached: Reached | None, given: Sequence[str] | None, seconds: float) -> Verdict:
    """Runs the tests of a mutant, the likeliest first."""
    from tests.mutation.killing import run

    found = list(given or ()) if reached is None else reached.tests(mutant)
    chosen = found if reached is None else within(seconds, found, reached.seconds)
    batches = [batch for batch in (chosen[:FIRST], chosen[FIRST:]) if batch]
    if not batches:
        return Verdict(mutant, "not reached")
    for batch in batches:
        outcome = run(batch, mutant, 3 * seconds + 30)
        if outcome.ended != "passed":
            return Verdict(mutant, "killed", outcome.killer or "the time was up", len(chosen), len(found))
    return Verdict(mutant, "survived", "", len(chosen), len(found))


def within(seconds: float, tests: Sequence[str], took: Mapping[str, float]) -> list[str]:
    """As many of some tests as take so long together, in their order."""
    chosen: list[str] = []
    for test in tests:
        if took[test] <= seconds:
            chosen.append(test)
            seconds -= took[test]
    return chosen


def killers_that_fail_alone(verdicts: Sequence[Verdict]) -> list[str]:
    """Tests that noticed a fault and fail without one, too: what they say does not count."""
    from tests.mutation.killing import run

    killers = sorted({verdict.killer for verdict in verdicts if "::" in verdict.killer})
    if not killers or run(killers, None, 600).ended == "passed":
        return []
    return [killer for killer in killers if run([killer], None, 600).ended != "passed"]


def table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The figures of each room and of all, in Markdown."""
    rooms: dict[str, list[Verdict]] = {folder.removeprefix("nbpeft/"): [] for folder in SCOPE} | {"all": [*verdicts]}
    for verdict in verdicts:
        folder = next(each for each in SCOPE if verdict.mutant.path.startswith(f"{each}/"))
        rooms[folder.removeprefix("nbpeft/")].append(verdict)
    yield "| room | faults | killed | survived | not reached | score |"
    yield "|---|---:|---:|---:|---:|---:|"
    for room, here in rooms.items():
        killed, survived, unreached = (
            sum(verdict.what == what for verdict in here) for what in ("killed", "survived", "not reached")
        )
        score = f"{killed / len(here):.0%}" if here else "–"
        yield f"| {room} | {len(here)} | {killed} | {survived} | {unreached} | {score} |"


if __name__ == "__main__":
    sys.exit(main())
