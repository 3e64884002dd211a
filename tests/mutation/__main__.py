"""The command line: ``python -m tests.mutation``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

from tests.mutation.mutants import Mutant, draw, mutants_of
from tests.mutation.reach import Reached, measure
from tests.mutation.reasons import KINDS, reason_of, reasons
from tests.mutation.scope import FOLDER, SCOPE, digest, paths, read

VERDICTS = FOLDER / "verdicts.jsonl"


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        what: killed by a test, survived all that ran.
        killer: the test that failed, or why it was killed without one.
        tests: how many tests ran, at most.
    """

    what: Literal["killed", "survived"]
    killer: str
    tests: int


Verdicts = dict[str, Verdict]
"""What became of each mutant, by `key`."""


def main(given: list[str] | None = None) -> int:
    """Draws faults, runs the tests that reach them, and prints a table and those that survived."""
    options = parser().parse_args(given)
    if options.reach is not None:
        return measure(options.reach)
    chosen = draw(list(mutants(options.only)), options.number, options.seed, read)
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    known = {} if options.tests else stored()
    here = [each for each in chosen if each.path.startswith(tuple(options.rooms))]
    todo = [each for each in here if key(each) not in known or (options.again and is_open(known[key(each)]))]
    judge_all(todo, options)
    verdicts = stored()
    judged = [(mutant, verdicts[key(mutant)]) for mutant in chosen if key(mutant) in verdicts]
    print("\n".join(survivor(mutant, verdict) for mutant, verdict in judged if is_open(verdict)))
    print("\n".join(["", *table(judged), *outdated()]))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tests.mutation", description="Which seeded faults the tests notice.")
    made.add_argument(
        "--reach", nargs="*", metavar="TEST", help="measure which of these tests (all) reach which line, and end"
    )
    made.add_argument("--number", type=int, default=60, help="how many faults (60)")
    made.add_argument("--seed", type=int, default=0, help="another draws others (0)")
    made.add_argument("--seconds", type=float, default=20, help="of processor time for the tests of a fault (20)")
    made.add_argument("--only", default="", metavar="PATH[:LINE]", help="only faults in files whose path ends so")
    made.add_argument("--rooms", nargs="+", default=SCOPE, metavar="FOLDER", help="judge only those drawn from here")
    made.add_argument("--tests", nargs="+", metavar="TEST", help="these tests, instead of those that reach the fault")
    made.add_argument("--at-once", type=int, default=1, help="how many processes (1)")
    made.add_argument("--again", action="store_true", help="try those again that survived before")
    made.add_argument("--list", action="store_true", help="show the faults, and run nothing")
    return made


def mutants(only: str) -> Iterator[Mutant]:
    """All faults in scope, or those of one file or one line."""
    ending, _, line = only.partition(":")
    for path in paths():
        if path.endswith(ending):
            yield from (each for each in mutants_of(path, read(path)) if not line or each.lines[0] == int(line))


def key(mutant: Mutant) -> str:
    """What tells a mutant from all others, while its file stays as it is."""
    return f"{digest(mutant.path)} {mutant.start} {mutant.operator} {mutant.after}"


def is_open(verdict: Verdict) -> bool:
    """Whether no test has noticed the fault yet."""
    return verdict.what == "survived"


def stored() -> Verdicts:
    """What became of mutants in all runs, the last verdict of each."""
    unsure = unsure_tests()
    found = [line for line in lines() if "key" in line and line["killer"] not in unsure]
    return {line["key"]: Verdict(line["what"], line["killer"], line["tests"]) for line in found}


def unsure_tests() -> set[str]:
    """The tests that failed without a fault, too: what they notice does not count."""
    return {line["unsure"] for line in lines() if "unsure" in line}


def lines() -> list[dict[str, Any]]:
    """What is stored."""
    return [json.loads(line) for line in VERDICTS.read_text(encoding="utf-8").splitlines()] if VERDICTS.exists() else []


def store(line: Mapping[str, Any]) -> None:
    """Stores a verdict, or a test that is unsure."""
    with VERDICTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def judge_all(mutants: Sequence[Mutant], options: argparse.Namespace) -> None:
    """Notes what becomes of some mutants: of those in functions first, then of those that act at an import."""
    from tests.mutation import killing

    reached = None if options.tests else Reached(unsure_tests())
    jobs = [job_of(mutant, reached, options.seconds) for mutant in mutants]
    if not jobs:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    shown = os.fdopen(os.dup(1), "w")

    def tell(job: killing.Job, found: killing.Found) -> None:
        mutant, tests, _ = job
        if mutant is None:
            for test in found:
                store({"unsure": test})
                print(f"fails without a fault, too: {test}", file=shown, flush=True)
        elif found != [killing.AT_IMPORT]:
            note(mutant, Verdict("killed" if found else "survived", *found[:1] or [""], len(tests)), shown)

    killing.import_in_advance()
    files = options.tests or sorted({test.partition("::")[0] for _, tests, _ in jobs for test in tests})
    before = len(lines())
    killing.judge(jobs, files, options.at_once, tell)
    judged = {line.get("key") for line in lines()[before:]}
    for mutant, tests, seconds in jobs:
        if key(mutant) not in judged:
            tell((mutant, tests, seconds), killing.run(tests or files, mutant, seconds))


def note(mutant: Mutant, verdict: Verdict, shown: TextIO) -> None:
    """Prints and stores a verdict."""
    store({"key": key(mutant), "mutant": str(mutant), **asdict(verdict)})
    print(f"{verdict.what:<9} {mutant}  [{verdict.killer or verdict.tests}]", file=shown, flush=True)


def job_of(mutant: Mutant, reached: Reached | None, seconds: float) -> tuple[Mutant, list[str], float]:
    """A mutant, the tests that may notice it, the likeliest first, and the seconds that they take."""
    if reached is None:
        return mutant, [], seconds
    reached.check_is_current(mutant.path)
    found = reached.tests(mutant)
    chosen = within(seconds, found, reached.seconds) or found[:1]
    return mutant, chosen, sum(reached.seconds[test] for test in chosen)


def within(seconds: float, tests: Sequence[str], took: Mapping[str, float]) -> list[str]:
    """As many of some tests as take so long together, in their order."""
    chosen: list[str] = []
    for test in tests:
        if took[test] <= seconds:
            chosen.append(test)
            seconds -= took[test]
    return chosen


def survivor(mutant: Mutant, verdict: Verdict) -> str:
    """A line about a fault that no test noticed."""
    kind, why = reason_of(mutant) or ("survived", f"[{verdict.tests}]")
    return f"{kind} {mutant}  {why}"


def outdated() -> Iterator[str]:
    """Reasons for faults that the sources no longer have."""
    for path in sorted({path for path, _ in reasons()}):
        found = {mutant.text for mutant in mutants(path)}
        yield from (f"no longer there: {path} {text}" for file, text in reasons() if file == path and text not in found)


def table(judged: Sequence[tuple[Mutant, Verdict]]) -> Iterator[str]:
    """The figures of each room and of all, in Markdown."""
    rooms = {folder.removeprefix("nbpeft/"): f"{folder}/" for folder in SCOPE} | {"all": ""}
    yield f"| room | faults | killed | survived | {' | '.join(KINDS)} | score |"
    yield f"|---|---:|---:|---:|{'---:|' * len(KINDS)}---:|"
    for room, folder in rooms.items():
        here = [(mutant, is_open(verdict)) for mutant, verdict in judged if mutant.path.startswith(folder)]
        open_ = [mutant for mutant, survived in here if survived]
        killed = len(here) - len(open_)
        kinds = Counter(found[0] for found in map(reason_of, open_) if found)
        score = f"{killed / len(here):.1%}" if here else "–"
        explained = " | ".join(str(kinds[kind]) for kind in KINDS)
        yield f"| {room} | {len(here)} | {killed} | {len(open_)} | {explained} | {score} |"


if __name__ == "__main__":
    sys.exit(main())
