"""Runs PEFT's own tests with PEFT and with nbpeft in its place, and prints how many pass with both.

    python -m tests.suites                              # every file of PEFT's tests that runs offline
    python -m tests.suites test_custom_models.py -k lora
    python -m tests.suites --sdist peft-0.21.2 --most 300

PEFT's source distribution carries its tests; it comes from the package index, models from ``hub.py``. Only what
passes with PEFT counts. What fails with nbpeft alone, with its messages, and logs are in ``artifacts/suites``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.clients.packages import DIFFUSERS, installed
from tests.suites import hub
from tests.suites.differences import OF_TESTS, kinds_of, told

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "artifacts" / "suites"
HUB = WORK / "hub"
ELSEWHERE = (
    *("common_gpu", "gpu_examples", "gptqmodel", "lora_megatron", "hub_features", "vision_models", "torch_compile"),
)
"""Files of tests that need a GPU, Megatron, or what only the hub has; that of compiling is off by default."""
PARAMETERIZED = "parameterized==0.9.0"
SCIPY = "scipy==1.17.1"
"""Which statistical tests of initial weights need."""
SKLEARN = ("scikit-learn==1.9.1", "joblib==1.6.0", "threadpoolctl==3.8.0", "cloudpickle==3.1.3", "narwhals==2.29.0")
"""Which PEFT's AdaMSS needs."""
PASSED = "passed"
HEAD = """\
| file | tests | ran | pass with PEFT | with nbpeft | % | % but for messages, refusals, internals | what differs |
|---|---:|---:|---:|---:|---:|---:|---|"""
"""The second percentage counts what differs in one of ``OF_TESTS`` as passed."""

PLUGIN = """\
import hashlib, json, os, sys

import pytest

class Everything(dict):
    def __contains__(self, name): return True
    def __missing__(self, name): return 1

def note(path, **what):
    with open(f'{os.environ["SUITES_RESULTS"]}/{os.path.basename(path)}.jsonl.part', "a") as file:
        file.write(json.dumps(what) + chr(10))

def with_peft(test):
    return test.replace("[PeftModel0]", "[PeftModel]").replace("[PeftModel1]", "[PeftMixedModel]")

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    files = {}
    for item in sorted(items, key=lambda item: hashlib.sha256(with_peft(item.nodeid).encode()).hexdigest()):
        files.setdefault(item.path, []).append(item)
    drawn = {item for found in files.values() for item in found[:int(os.environ["SUITES_MOST"])]}
    for path, found in files.items():
        note(path, tests=len(found))
    items[:] = [item for item in items if item in drawn]
    helpers = sys.modules.get("tests.testing_utils")
    if helpers is not None:
        helpers._HUB_MODEL_ACCESSES = Everything()

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash else str(report.longrepr)
        ended = said[:2000] if report.outcome == "failed" else report.outcome
        note(report.nodeid.partition("::")[0], test=with_peft(report.nodeid), ended=ended)
"""
"""A plugin of pytest's: the same tests are drawn for both, none asks the hub, and the end of each is noted.

``PeftMixedModel`` is ``PeftModel`` in nbpeft, so pytest numbers their tests: they get the ids that they have with PEFT.
"""


def main() -> int:
    """Runs the chosen files and prints the table."""
    arguments, rest = _parse()
    tests = _package_of(arguments.sdist or _download())
    hub.fill(HUB, tests)
    (WORK / "suites_plugin.py").write_text(PLUGIN)
    print(HEAD, flush=True)
    total = Counter[str]()
    files = [tests / f"{Path(name).stem}.py" for name in arguments.files] or _runnable(tests)
    for first in range(0, len(files), arguments.together):
        batch = files[first : first + arguments.together]
        anew = [file for file in batch if not (arguments.reuse and _results(file, alias=False).exists())]
        run(anew, rest, arguments, alias=False)
        run(batch, rest, arguments, alias=True)
        for file in batch:
            counts, differing = compare(file)
            total.update(counts)
            print(row(file.stem, counts, differing), flush=True)
    print(row("all", total, ""))
    return 0 if total["both"] == total["passed"] else 1


def compare(file: Path) -> tuple[dict[str, int], str]:
    """What the columns of a file's row count, and the kinds of what fails with nbpeft alone."""
    theirs, ours = read(_results(file, alias=False)), read(_results(file, alias=True))
    wanted = [test for test, ended in theirs.items() if ended == PASSED]
    missed = {test: ours.get(test, "did not run") for test in wanted if ours.get(test) != PASSED}
    (WORK / f"{file.stem}.txt").write_text("".join(f"{test}\n    {said}\n" for test, said in missed.items()))
    counts = {"ran": len(theirs), "passed": len(wanted), "both": len(wanted) - len(missed)}
    kinds = kinds_of(f"{test}\n{said}" for test, said in missed.items())
    counts["alike"] = counts["both"] + sum(kinds[kind] for kind in OF_TESTS)
    counts["tests"] = collected(_results(file, alias=False))
    return counts, told(file.stem.removeprefix("test_"), kinds)


def row(title: str, count: Mapping[str, int], differing: str) -> str:
    """A row of the table, in Markdown."""
    numbers = [f"{count[name]:,}" for name in ("tests", "ran", "passed", "both")]
    shares = [f"{100 * count[name] / count['passed']:.1f}" if count["passed"] else "-" for name in ("both", "alike")]
    return f"| {' | '.join((title, *numbers, *shares, differing))} |"


def run(files: Sequence[Path], options: Sequence[str], limits: argparse.Namespace, *, alias: bool) -> None:
    """Runs files in one process, which leaves their results and a log.

    Args:
        files: with tests, of one folder.
        options: for pytest.
        limits: the most tests of a file that run, and for how many minutes.
        alias: with nbpeft by the name ``peft``.
    """
    if not files:
        return
    folder = files[0].parent
    parts = {_results(file, alias=alias).with_suffix(".jsonl.part"): _results(file, alias=alias) for file in files}
    for part in parts:
        part.unlink(missing_ok=True)
    settings = [
        "-q",
        "--tb=short",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        "-p",
        "suites_plugin",
        "-c",
        os.devnull,
    ]
    pytest = ["-m", "pytest", *settings, f"--rootdir={folder}", "--timeout=120", *options, *map(str, files)]
    command = [sys.executable, *(["-m", "nbpeft.as_peft", *pytest] if alias else pytest)]
    packages = (installed(*DIFFUSERS), installed(PARAMETERIZED), installed(SCIPY), installed(*SKLEARN))
    paths = os.pathsep.join(map(str, (ROOT, WORK, folder.parent, *packages)))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(HUB), "HF_ENDPOINT": "http://127.0.0.1:9"}
    results = _results(files[0], alias=alias).parent
    results.mkdir(exist_ok=True)
    own = {"SUITES_MOST": str(limits.most), "SUITES_RESULTS": str(results), "PYTHONPATH": paths}
    with (
        (results / f"{files[0].stem}.log").open("w") as log,
        subprocess.Popen(
            command, cwd=folder, env={**os.environ, **quiet, **offline, **own}, stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            process.wait(60 * limits.minutes * len(files))
        except subprocess.TimeoutExpired:
            process.kill()
    for part, whole in parts.items():
        if part.exists():
            part.replace(whole)


def read(results: Path) -> dict[str, str]:
    """Test -> ``PASSED``, ``skipped``, or the message of its failure."""
    return {note["test"]: note["ended"] for note in _notes(results) if "test" in note}


def collected(results: Path) -> int:
    """How many tests a file has."""
    return sum(note.get("tests", 0) for note in _notes(results))


def _notes(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _results(file: Path, *, alias: bool) -> Path:
    return WORK / ("nbpeft" if alias else "with-peft") / f"{file.name}.jsonl"


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
    parser.add_argument("--minutes", type=float, default=60, help="per file, after which a process is stopped")
    parser.add_argument("--together", type=int, default=8, help="files in one process")
    parser.add_argument("--reuse", action="store_true", help="PEFT's results of the last run, where they are")
    WORK.mkdir(parents=True, exist_ok=True)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(main())
