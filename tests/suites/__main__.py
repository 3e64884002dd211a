"""Runs PEFT's own tests with PEFT and with nbpeft in its place, and prints how many pass with both.

    python -m tests.suites                              # every file of PEFT's tests that runs offline
    python -m tests.suites test_custom_models.py -k lora
    python -m tests.suites --sdist peft-0.21.2 --most 300

PEFT's source distribution carries its tests; it comes from the package index, models from ``hub.py``. Only what
passes with PEFT counts. Names, reports and logs of what fails with nbpeft alone are in ``artifacts/suites``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from tests.clients.packages import DIFFUSERS, installed
from tests.suites import hub

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "artifacts" / "suites"
ELSEWHERE = ("common_gpu", "gpu_examples", "gptqmodel", "lora_megatron", "hub_features")
"""Files of tests that need a GPU, Megatron, or what only the hub has."""
PARAMETERIZED = "parameterized==0.9.0"
SCIPY = "scipy==1.17.1"
"""Which statistical tests of initial weights need."""
PASSED, SKIPPED = "passed", "skipped"
Results = dict[str, str]
"""Test -> ``PASSED``, ``SKIPPED``, or the message of its failure."""

KINDS = {
    "wording": r"Regex pattern did not match|Input: |DID NOT WARN[^[]*Emitted warnings: \[[^]]",
    "accepted, PEFT refuses": "DID NOT RAISE",
    "no warning": "DID NOT WARN",
    "PEFT's internals": r"has no attribute '_|does not have the attribute|is not available: nbpeft does not implement",
    "time": "Timeout",
}
"""A kind of difference -> what the failure's message says."""

PLUGIN = """\
import hashlib, os, sys

import pytest

class Everything(dict):
    def __contains__(self, name): return True
    def __missing__(self, name): return 1

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    order = sorted(items, key=lambda item: hashlib.sha256(item.nodeid.encode()).hexdigest())
    most = int(os.environ["SUITES_MOST"])
    dropped = set(order[most:])
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=order[most:])
    helpers = sys.modules.get("tests.testing_utils")
    if helpers is not None:
        helpers._HUB_MODEL_ACCESSES = Everything()
"""
"""A plugin of pytest's: the same tests are drawn for both, and none of them asks the hub."""


def main() -> int:
    """Runs the chosen files and prints the table."""
    arguments, rest = _parse()
    tests = _package_of(arguments.sdist or _download())
    cache = WORK / "hub"
    hub.fill(cache, tests)
    (WORK / "suites_plugin.py").write_text(PLUGIN)
    print("| file | tests | ran | pass with PEFT | with nbpeft | % | what differs |", flush=True)
    print("|---|---:|---:|---:|---:|---:|---|", flush=True)
    total = Counter[str]()
    for file in [tests / f"{Path(name).stem}.py" for name in arguments.files] or _runnable(tests):
        report = _report(file, alias=False)
        if not (arguments.reuse and report.exists()):
            run(file, cache, rest, arguments, alias=False)
        run(file, cache, rest, arguments, alias=True)
        theirs, ours = _results(report), _results(_report(file, alias=True))
        wanted = [test for test, ended in theirs.items() if ended == PASSED]
        missed = sorted(test for test in wanted if ours.get(test) != PASSED)
        (WORK / f"{file.stem}.txt").write_text("\n".join([*missed, ""]))
        count = {"ran": len(theirs), "tests": len(theirs) + _deselected(report), "passed": len(wanted)}
        count["both"] = len(wanted) - len(missed)
        total.update(count)
        print(row(file.stem, count, kinds_of([ours.get(test, "") for test in missed])), flush=True)
    print(row("all", total, ""))
    return 0 if total["both"] == total["passed"] else 1


def kinds_of(failures: Iterable[str]) -> str:
    """How many failures are of each kind, in words."""
    found = Counter(
        next((kind for kind, said in KINDS.items() if re.search(said, message)), "other") for message in failures
    )
    return ", ".join(f"{number} {kind}" for kind, number in found.most_common())


def row(title: str, count: Mapping[str, int], differing: str) -> str:
    """A row of the table, in Markdown."""
    percent = f"{100 * count['both'] / count['passed']:.1f}" if count["passed"] else "-"
    cells = (title, *(f"{count[name]:,}" for name in ("tests", "ran", "passed", "both")), percent, differing)
    return f"| {' | '.join(cells)} |"


def run(file: Path, cache: Path, options: Sequence[str], limits: argparse.Namespace, *, alias: bool) -> None:
    """Runs one file and leaves its report and its log.

    Args:
        file: the file with tests.
        cache: where tiny models are.
        options: for pytest.
        limits: the most tests that run and for how many minutes.
        alias: with nbpeft by the name ``peft``.
    """
    report = _report(file, alias=alias)
    report.unlink(missing_ok=True)
    settings = ["-q", "-p", "no:cacheprovider", "-p", "suites_plugin", "-c", os.devnull, f"--rootdir={file.parent}"]
    pytest = ["-m", "pytest", *settings, f"--junitxml={report}", "--timeout=300", *options, str(file)]
    command = [sys.executable, *(["-m", "nbpeft.as_peft", *pytest] if alias else pytest)]
    packages = (installed(*DIFFUSERS), installed(PARAMETERIZED), installed(SCIPY))
    paths = os.pathsep.join(map(str, (ROOT, WORK, file.parent.parent, *packages)))
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "SUITES_MOST": str(limits.most),
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {**os.environ, **quiet, **offline, "PYTHONPATH": paths}
    with (
        report.with_suffix(".log").open("w") as log,
        subprocess.Popen(command, cwd=file.parent, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            process.wait(60 * limits.minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest writes the report of what ran


def _report(file: Path, *, alias: bool) -> Path:
    return WORK / f"{file.stem}-{'nbpeft' if alias else 'peft'}.xml"


def _deselected(report: Path) -> int:
    found = re.search(r"(\d+) deselected", report.with_suffix(".log").read_text()[-500:])
    return int(found[1]) if found else 0


def _results(report: Path) -> Results:
    if not report.exists():
        return {}
    found: Results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        ends = {child.tag: child.get("message") or "failed" for child in case}
        failed = ends.get("failure") or ends.get("error")
        found[f"{case.get('classname')}::{case.get('name')}"] = failed or (SKIPPED if "skipped" in ends else PASSED)
    return found


def _download() -> Path:
    """The source distribution of the installed PEFT, unpacked."""
    version = metadata.version("peft")
    folder = WORK / f"peft-{version}"
    if not folder.exists():
        choice = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"peft=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", str(WORK), *choice], check=True)
        with tarfile.open(WORK / f"peft-{version}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    return folder


def _runnable(tests: Path) -> list[Path]:
    return [file for file in sorted(tests.glob("test_*.py")) if file.stem.removeprefix("test_") not in ELSEWHERE]


def _package_of(sdist: Path) -> Path:
    """A copy of the tests as a package, which their relative imports need and the distribution lacks."""
    tests = WORK / "peft" / "tests"
    shutil.copytree(sdist / "tests", tests, dirs_exist_ok=True)
    (tests / "__init__.py").touch()
    return tests


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description="Other arguments go to pytest.")
    parser.add_argument("files", nargs="*", help="files of PEFT's tests")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution, unpacked; else it is downloaded")
    parser.add_argument("--most", type=int, default=10**6, help="of a file with more tests, so many are drawn")
    parser.add_argument("--minutes", type=float, default=60, help="after which a file is interrupted")
    parser.add_argument("--reuse", action="store_true", help="PEFT's results of the last run, where they are")
    WORK.mkdir(parents=True, exist_ok=True)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
