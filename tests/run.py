"""Checks everything on a fresh machine: ``python3 tests/run.py``.

Makes the virtual environment and finds a browser if they are not there, then runs the linters,
the type checker, the import contracts and the tests. Needs nothing but Python.

Of the slow tests (notebooks, browsers, kernels, compiled models, a real model, two processes) it
runs a slice, a few of each kind; ``--all`` runs them all, and ``--long`` fuzzes for hours besides.
``--stack`` runs the quick tests with the lowest, Colab's or the newest packages (``tests/stacks``),
and ``--all`` a notebook with each of them. ``--kernels`` runs the tests as on a processor with an older
instruction set, and ``--all`` the numeric ones with the oldest.

The Python that starts it is the one that the tests run in: each has an environment of its own. ``--all`` runs some
folders of the quick tests with each other Python whose environment is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))

import environment

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_TESTS_COLLECTED = 5
SLOWEST_FILES = 10
SLOW = "slow or browser or long"
STACKS = ("lowest", "colab", "newest")
PYTHON_SLICE = ("tests/examples", "tests/faults", "tests/magics/test_complete.py", "tests/test_nothing_evaluated.py")
"""Quick tests of what a Python changes: docstrings, the errors of ``pathlib``, the compiler."""
# What tells torch, oneDNN and MKL which instructions of an x86 processor they may use.
KERNELS = {
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # Without VNNI oneDNN's sums of 8-bit products saturate. On a processor without it torch does not use them.
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
NUMERIC = ("tests/engine/methods", "tests/losses", "tests/model/test_oracle.py", "tests/test_matrix.py")


@dataclass
class Part:
    """One command to run.

    Attributes:
        title: what it does.
        command: arguments after the environment's interpreter.
        remedy: what to do when it fails.
        report: where pytest writes its counts, for the parts that are tests.
        variables: what it needs in its environment.
        python: the interpreter, if it is not that of the environment.
        aside: whether it runs beside the others, on a core, and shows what it prints when those are through.
        seconds: how long it took.
        status: its exit status.
        counts: how many tests passed, failed and were skipped.
        files: seconds that the tests of each file took together.
    """

    title: str
    command: list[str]
    remedy: str
    report: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    python: Path | None = None
    aside: bool = False
    seconds: float = 0.0
    status: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    files: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ended badly; a part of the tests may be left without any by a filter."""
        return self.status not in ((0, NO_TESTS_COLLECTED) if self.report else (0,))


def main() -> int:
    """Sets up, runs the parts, and ends with the times and the counts."""
    environment.require_python()
    arguments, pytest_arguments = parse()
    os.environ.update(KERNELS.get(arguments.kernels, {}))
    try:
        python = environment.ensure("test")
        needs_browser = arguments.only in (None, "slow") and not arguments.no_browser and arguments.stack is None
        browser = find_browser(python) if needs_browser else None
    except environment.SetupError as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    environment.ARTIFACTS.mkdir(exist_ok=True)
    if arguments.stack is not None:
        command = [str(python), "-m", "tests.stacks", arguments.stack, *pytest_arguments]
        return subprocess.run(command, cwd=environment.ROOT, env=environment.child_environment()).returncode
    parts = chosen_parts(arguments, pytest_arguments, browser)
    run_all(parts, python)
    return conclude(parts)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line: our options, and what is for pytest."""
    parser = argparse.ArgumentParser(
        description="Runs the checks: lint, types, the quick tests, and a slice of the slow ones. Slow tests that a "
        "path or -k names run all. Other arguments go to pytest: paths, -x, --lf, -n 0, …"
    )
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--all", dest="tier", action="store_const", const="all", help="every slow test, every case")
    tier.add_argument("--long", dest="tier", action="store_const", const="long", help="all, and hours of fuzzing")
    parser.set_defaults(tier="quick")
    parser.add_argument("--only", choices=("lint", "unit", "slow"), help="only this part")
    parser.add_argument("--stack", choices=STACKS, help="the quick tests with other versions: what differs")
    parser.add_argument("--kernels", choices=KERNELS, help="the tests as on a processor that has no newer instructions")
    parser.add_argument("--no-browser", action="store_true", help="leave out the tests that drive a browser")
    parser.add_argument("-k", metavar="EXPRESSION", help="only the tests that match it, as in pytest")
    arguments, rest = parser.parse_known_args()
    absent = [path for path in rest if looks_like_a_path(path) and not path_of(path).exists()]
    if absent:
        parser.error(f"there is no {absent[0]}")
    if arguments.kernels is not None and not has_instructions(arguments.kernels):
        parser.error(f"this processor has no {arguments.kernels}")
    return arguments, [*(["-k", arguments.k] if arguments.k else []), *rest]


def has_instructions(kernels: str) -> bool:
    """Whether this processor has the instructions of a set, as far as the system says which it has."""
    flags = {"sse": "sse4_1", "avx2": "avx2", "avx512": "avx512f"}
    try:
        return flags[kernels] in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def looks_like_a_path(argument: str) -> bool:
    """Whether an argument for pytest names a file, a folder or a test, and is no option and no value of one."""
    return not argument.startswith("-") and ("/" in argument or "::" in argument or argument.endswith(".py"))


def path_of(argument: str) -> Path:
    """The file or folder of an argument for pytest, which may name a test in it."""
    return environment.ROOT / argument.partition("::")[0]


def chosen_parts(arguments: argparse.Namespace, pytest_arguments: list[str], browser: str | None) -> list[Part]:
    """The parts that the command line asks for, in the order in which they run."""
    parts = []
    if arguments.only == "lint" or (arguments.only is None and not pytest_arguments):
        parts += lint_parts()
    if arguments.only != "lint":
        parts += test_parts(arguments, pytest_arguments, browser)
    if arguments.only is None and arguments.tier != "quick" and not pytest_arguments:
        parts += [*stack_parts(), *python_parts()]
    titles = {"unit": "quick tests", "slow": "slow tests"}
    return [part for part in parts if arguments.only not in titles or part.title == titles[arguments.only]]


def lint_parts() -> list[Part]:
    """Linters, types and import contracts."""
    python = environment.venv_python().relative_to(environment.ROOT)
    return [
        Part("ruff check", ["-m", "ruff", "check", "."], f"{python} -m ruff check --fix . repairs most of it"),
        Part("ruff format", ["-m", "ruff", "format", "--check", "."], f"{python} -m ruff format . rewrites the files"),
        Part("mypy", ["-m", "mypy"], "each line above names the file, the line and what is wrong", aside=True),
        Part(
            "import contracts",
            ["-c", "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"],
            "a broken contract names the import; the layers are in pyproject.toml under tool.importlinter",
            aside=True,
        ),
    ]


def test_parts(arguments: argparse.Namespace, pytest_arguments: list[str], browser: str | None) -> list[Part]:
    """The tests in two parts: quick ones on all cores, then slow ones, two at a time.

    Slow tests train real models and drive a browser: more of them at once would want more memory
    than a laptop has. A file of them stays in one process, which shares what it has set up.
    """
    cores = os.cpu_count() or 1
    quick_workers, slow_workers = min(cores, 4), min(cores, 2)
    shared = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NBPEFT_TESTS": arguments.tier}
    # A kernel compiled for one instruction set computes nonsense under another, which its cache does not tell apart.
    instructions = os.environ.get("ATEN_CPU_CAPABILITY", "own")
    shared["TORCHINDUCTOR_CACHE_DIR"] = str(environment.ARTIFACTS / f"inductor-{instructions}")
    tier = "" if arguments.tier == "quick" else f"--{arguments.tier} "
    marks = slow_marks(arguments, pytest_arguments)
    oldest = {**shared, **KERNELS["sse"], "TORCHINDUCTOR_CACHE_DIR": str(environment.ARTIFACTS / "inductor-default")}
    parts = [
        Part(
            "quick tests",
            ["-m", "pytest", "-m", f"not ({SLOW})", *workers(quick_workers, "worksteal"), *pytest_arguments],
            f"python3 tests/run.py {tier}--only unit --lf runs only those that failed",
            environment.ARTIFACTS / "tests-quick.xml",
            {**shared, **threads(1)},
        ),
        Part(
            "slow tests",
            [
                *("-m", "pytest", "-m", marks, "--durations=10", "--no-loadscope-reorder"),
                *workers(slow_workers, "loadfile"),
                *pytest_arguments,
                *(() if is_named(arguments, pytest_arguments) else files_with(marks)),
            ],
            f"python3 tests/run.py {tier}--only slow --lf runs only those that failed",
            environment.ARTIFACTS / "tests-slow.xml",
            {**shared, **threads(cores // slow_workers), **({"CHROMIUM": browser} if browser else {})},
        ),
    ]
    if arguments.tier == "quick" or pytest_arguments or arguments.kernels or not has_instructions("sse"):
        return parts
    return [
        *parts,
        Part(
            "oldest kernels",
            ["-m", "pytest", "-m", f"not ({SLOW})", *workers(quick_workers, "worksteal"), *NUMERIC],
            "python3 tests/run.py --kernels sse --only unit --lf runs only those that failed",
            environment.ARTIFACTS / "tests-oldest-kernels.xml",
            {**oldest, "NBPEFT_TESTS": "quick", **threads(1)},
        ),
    ]


def stack_parts() -> list[Part]:
    """A notebook in the environment of each stack, which is made if it is not there."""
    return [
        Part(
            f"stack {name}",
            ["-m", "tests.stacks", name, "--slice"],
            f"python3 tests/run.py --stack {name} runs all quick tests with these versions, and says what differs",
            aside=True,
        )
        for name in STACKS
    ]


def python_parts() -> list[Part]:
    """Some quick tests with each other Python; one without an environment is left out, for torch may be 3 GB."""
    parts = []
    for version in environment.PYTHONS:
        venv = environment.venv_of(version)
        if venv == environment.VENV or not shutil.which(f"python{version}"):
            continue
        again = f"python{version} tests/run.py --only unit"
        if not environment.is_made(venv):
            print(f"Python {version} is left out: {again} makes its environment and runs the quick tests with it.")
            continue
        command = ["-m", "pytest", "-q", "-m", f"not ({SLOW})", *workers(2, "worksteal"), *PYTHON_SLICE]
        report = environment.ARTIFACTS / f"tests-{version}.xml"
        variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **threads(1)}
        remedy = f"{again} runs all quick tests with it"
        parts.append(Part(f"Python {version}", command, remedy, report, variables, environment.venv_python(venv)))
    return parts


def slow_marks(arguments: argparse.Namespace, pytest_arguments: list[str]) -> str:
    """Which slow tests run, as pytest's ``-m`` has it: those that are asked for by name are not sliced."""
    marks = f"({SLOW})" if arguments.tier == "long" else "(slow or browser) and not long"
    if arguments.tier == "quick" and not is_named(arguments, pytest_arguments):
        marks += " and slice"
    return f"{marks} and not browser" if arguments.no_browser else marks


def is_named(arguments: argparse.Namespace, pytest_arguments: list[str]) -> bool:
    """Whether tests are asked for by a path or with ``-k``."""
    paths = [path_of(argument) for argument in pytest_arguments if not argument.startswith("-")]
    return arguments.k is not None or any(path.exists() for path in paths)


def files_with(marks: str) -> list[str]:
    """Files with slow tests, or with slices if ``marks`` asks for these: to import all others takes half a minute."""
    names = ("slice",) if "and slice" in marks else ("slow", "browser", "long")
    files = {path: path.read_text(encoding="utf-8") for path in sorted((environment.ROOT / "tests").rglob("test_*.py"))}
    return [
        path.relative_to(environment.ROOT).as_posix()
        for path, text in files.items()
        if any(f"pytest.mark.{name}" in text for name in names)
    ]


def workers(number: int, distribution: str) -> list[str]:
    """Options of pytest for tests side by side."""
    return ["-n", str(number), "--dist", distribution]


def threads(number: int) -> dict[str, str]:
    """What tells the libraries how many threads a process may use."""
    return {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}


def run_all(parts: list[Part], python: Path) -> None:
    """Runs the parts one after another, and beside them those that leave the terminal to the others."""
    with ThreadPoolExecutor(1) as other, tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        ends = [other.submit(run, part, python, printed) for part in parts if part.aside]
        for part in parts:
            if not part.aside:
                run(part, python)
        for end in ends:
            end.result()
        printed.seek(0)
        print(printed.read(), end="", flush=True)


def run(part: Part, python: Path, terminal: TextIO | None = None) -> None:
    """Runs one part, in this terminal or into a file, and notes its status, time and counts."""
    arguments = list(part.command)
    if part.report:
        part.report.unlink(missing_ok=True)
        arguments.append(f"--junitxml={part.report}")
    print(f"\n› {part.title}: python {subprocess.list2cmdline(arguments)}", file=terminal, flush=True)
    start = time.monotonic()
    variables = environment.child_environment(**part.variables)
    done = subprocess.run(
        [str(part.python or python), *arguments],
        cwd=environment.ROOT,
        env=variables,
        stdout=terminal,
        stderr=terminal,
    )
    part.status = done.returncode
    part.seconds = time.monotonic() - start
    if part.report and part.report.exists():
        part.counts, part.files = read_counts(part.report), read_files(part.report)


def read_counts(report: Path) -> dict[str, int]:
    """How many tests passed, failed (errors included) and were skipped, from pytest's report."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    number = {name: int(suite.get(name, 0)) if suite is not None else 0 for name in ("tests", "failures", "errors")}
    skipped = int(suite.get("skipped", 0)) if suite is not None else 0
    failed = number["failures"] + number["errors"]
    return {"passed": number["tests"] - failed - skipped, "failed": failed, "skipped": skipped}


def read_files(report: Path) -> dict[str, float]:
    """Seconds that the tests of each file took, from pytest's report."""
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        names = case.get("classname", "").split(".")
        module = next((index for index, name in enumerate(names) if name.startswith("test_")), len(names) - 1)
        path = "/".join(names[: module + 1]) + ".py"
        seconds[path] = seconds.get(path, 0.0) + float(case.get("time", 0))
    return seconds


def print_slowest(parts: list[Part]) -> None:
    """Prints the files whose tests took longest, quick and slow ones together."""
    seconds: dict[str, float] = {}
    for part in parts:
        for path, took in part.files.items():
            seconds[path] = seconds.get(path, 0.0) + took
    if seconds:
        print("\nslowest files")
    for path in sorted(seconds, key=lambda path: -seconds[path])[:SLOWEST_FILES]:
        print(f"{environment.duration(seconds[path]):>14}  {path}")


def conclude(parts: list[Part]) -> int:
    """Prints what each part came to and, last, the counts of all tests.

    Returns:
        The exit status: 0 only if nothing failed and, where tests were asked for, some ran.
    """
    print()
    for part in parts:
        verdict = "FAILED" if part.failed else "no tests" if part.status == NO_TESTS_COLLECTED else "ok"
        print(f"{part.title:<18} {verdict:<10} {environment.duration(part.seconds):>14}")
    for part in parts:
        if part.failed:
            print(f"\n{part.title} failed: {part.remedy}.")
    tests = [part for part in parts if part.report]
    total = {name: sum(part.counts.get(name, 0) for part in tests) for name in ("passed", "failed", "skipped")}
    none_ran = bool(tests) and total["passed"] + total["failed"] == 0
    if none_ran:
        print("\nNo test ran: nothing matched what was asked for.")
    print_slowest(tests)
    if tests:
        print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if none_ran or any(part.failed for part in parts) else 0


def find_browser(python: Path) -> str:
    """The browser for the browser tests, installed first if there is none.

    Returns:
        Its executable.

    Raises:
        SetupError: there is none and none could be installed.
    """
    found = browser_here(python)
    if found is None:
        install_browser(python)
        found = browser_here(python)
    if found is None:
        raise environment.SetupError(
            "There is no browser for the browser tests. Install Chromium or Chrome, or set CHROMIUM to its path, "
            "or leave those tests out with --no-browser."
        )
    return found


def browser_here(python: Path) -> str | None:
    """A browser that is already there: named by CHROMIUM, on the path, or Playwright's own."""
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, (named, *BROWSERS) if named else BROWSERS)), None)
    if found:
        return found
    code = (
        "from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as playwright: print(playwright.chromium.executable_path)"
    )
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, env=environment.child_environment()
    )
    path = done.stdout.strip()
    return path if path and Path(path).exists() else None


def install_browser(python: Path) -> None:
    """Installs Debian's Chromium where that is possible, else Playwright's build."""
    root = os.name == "posix" and os.geteuid() == 0
    log = environment.VENV / "browser-setup.log"
    if root and shutil.which("apt-get") and is_debian():
        os.environ.setdefault("DEBIAN_FRONTEND", "noninteractive")
        with environment.step("installing Chromium with apt-get, for the browser tests"):
            environment.run_showing_progress(["apt-get", "update"], log)
            code, _ = environment.run_showing_progress(
                ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"], log
            )
        if code == 0:
            return
    options = ["--with-deps"] if root and sys.platform == "linux" else []
    with environment.step("installing Playwright's Chromium, for the browser tests"):
        environment.run_showing_progress([str(python), "-m", "playwright", "install", *options, "chromium"], log)


def is_debian() -> bool:
    """Whether this is Debian itself: Ubuntu's package of that name only points to a snap."""
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return "ID=debian" in lines


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again: it goes on from what is there.")
