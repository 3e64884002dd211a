"""Runs PEFT's own tests with PEFT and with nbpeft in its place, and prints how many pass with both.

    python -m tests.suites                              # every file of PEFT's tests that runs offline
    python -m tests.suites test_custom_models.py -k lora
    python -m tests.suites --sdist peft-0.21.2 --share 0.1

PEFT's source distribution carries its tests; it comes from the package index, models from ``hub.py``. Only what
passes with PEFT counts. Reports of what fails with nbpeft alone are in ``artifacts/suites``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tests.clients.packages import DIFFUSERS, installed
from tests.suites import hub

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "artifacts" / "suites"
ELSEWHERE = ("common_gpu", "gpu_examples", "gptqmodel", "lora_megatron", "hub_features")
"""Files of tests that need a GPU, Megatron, or what only the hub has."""
PARAMETERIZED = "parameterized==0.9.0"
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
Results = dict[str, str]
"""Test -> how it ended."""

PLUGIN = """\
import hashlib, os, sys

class Everything(dict):
    def __contains__(self, name): return True
    def __missing__(self, name): return 1

def pytest_collection_modifyitems(items):
    share = float(os.environ["SUITES_SHARE"])
    items[:] = [item for item in items if int(hashlib.sha256(item.name.encode()).hexdigest()[:8], 16) < share * 2**32]
    helpers = sys.modules.get("tests.testing_utils")
    if helpers is not None:
        helpers._HUB_MODEL_ACCESSES = Everything()
"""
"""A plugin of pytest's: the same share of the tests for both, and none of them asks the hub."""


def main() -> int:
    """Runs the chosen files and prints the table."""
    arguments, rest = _parse()
    tests = _package_of(arguments.sdist or _download())
    cache = WORK / "hub"
    hub.fill(cache, tests)
    (WORK / "suites_plugin.py").write_text(PLUGIN)
    print(f"{'file':<34} {'ran':>6} {'PEFT':>6} {'nbpeft':>6}      %")
    passed = both = 0
    for file in [tests / f"{Path(name).stem}.py" for name in arguments.files] or _runnable(tests):
        theirs, ours = (run(file, cache, rest, arguments.share, alias=alias) for alias in (False, True))
        wanted = {test for test, ended in theirs.items() if ended == PASSED}
        missed = sorted(test for test in wanted if ours.get(test) != PASSED)
        (WORK / f"{file.stem}.txt").write_text("\n".join([*missed, ""]))
        passed, both = passed + len(wanted), both + len(wanted) - len(missed)
        print(line(file.stem, len(theirs), len(wanted), len(wanted) - len(missed)), flush=True)
    print(line("all", 0, passed, both))
    return 0 if both == passed else 1


def line(title: str, ran: int, passed: int, both: int) -> str:
    """A line of the table."""
    percent = f"{100 * both / passed:6.1f}" if passed else "     -"
    return f"{title:<34} {ran or '':>6} {passed:>6} {both:>6} {percent}"


def run(file: Path, cache: Path, options: Sequence[str], share: float, *, alias: bool) -> Results:
    """Runs one file; returns how each of its tests ended.

    Args:
        file: the file with tests.
        cache: where tiny models are.
        options: for pytest.
        share: the share of the tests that run, 0 to 1.
        alias: with nbpeft by the name ``peft``.
    """
    report = WORK / f"{file.stem}-{'nbpeft' if alias else 'peft'}.xml"
    report.unlink(missing_ok=True)
    settings = ["-q", "-p", "no:cacheprovider", "-p", "suites_plugin", "-c", os.devnull, f"--rootdir={file.parent}"]
    pytest = ["-m", "pytest", *settings, f"--junitxml={report}", "--timeout=300", *options, str(file)]
    command = [sys.executable, *(["-m", "nbpeft.as_peft", *pytest] if alias else pytest)]
    paths = os.pathsep.join(map(str, (ROOT, WORK, file.parent.parent, installed(*DIFFUSERS), installed(PARAMETERIZED))))
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "SUITES_SHARE": str(share),
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {**os.environ, **quiet, **offline, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True)
    (WORK / f"{report.stem}.log").write_text(done.stdout + done.stderr)
    return _results(report)


def _results(report: Path) -> Results:
    if not report.exists():
        return {}
    found: Results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        ended = FAILED if kinds & {"failure", "error"} else SKIPPED if "skipped" in kinds else PASSED
        found[f"{case.get('classname')}::{case.get('name')}"] = ended
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
    parser.add_argument("--share", type=float, default=1.0, help="the share of each file's tests that runs, 0 to 1")
    WORK.mkdir(parents=True, exist_ok=True)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
