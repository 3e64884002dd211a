"""The command that builds and checks a release: it succeeds here, and each of its checks can fail."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_run_commands import ROOT, script

checks = script("notebooks", "release_checks")
INFO = f"nbpeft-{checks.own_version()}.dist-info"
TOKEN, PLACE = "hf_" + "a" * 30, "/".join(("", "root", "notes"))


def wheel_of(folder: Path, **changes: str | None) -> Path:
    """A wheel with what it needs, and with changed or missing files; ``__`` in a name is a slash."""
    described = f"Name: nbpeft\nVersion: {checks.own_version()}\n"
    files = dict.fromkeys(checks.needed_files(INFO), "")
    files |= {f"{INFO}/METADATA": described, f"{INFO}/WHEEL": "Tag: py3-none-any\n", f"{INFO}/RECORD": ""}
    for name, text in changes.items():
        files[name] = text  # type: ignore[assignment]
    path = folder / "nbpeft.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            if text is not None:
                archive.writestr(name, text)
    return path


def sdist_of(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "nbpeft.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"nbpeft-1/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def failed_files(folder: Path, wheel: Path, sdist: dict[str, str]) -> list[str]:
    report = checks.Report()
    checks.check_files(wheel, sdist_of(folder, sdist), report)
    assert isinstance(report.failed, list)
    return report.failed


def test_whole_files_pass(tmp_path: Path) -> None:
    sdist = {"README.md": "Read.", "tests/test_tokens.py": TOKEN, "notebooks/01.ipynb": "{}"}
    assert failed_files(tmp_path, wheel_of(tmp_path), sdist) == []


@pytest.mark.parametrize(
    ("in_wheel", "in_sdist", "failed"),
    [
        ({"nbpeft/py.typed": None}, {}, "wheel has what it needs"),
        ({"nbpeft/AGENTS.md": None}, {}, "wheel has what it needs"),
        ({f"{INFO}/licenses/LICENSE": None}, {}, "wheel has what it needs"),
        ({"nbpeft/errors.py": None}, {}, "wheel has what it needs"),
        ({"tests/run.py": ""}, {}, "wheel has nothing else"),
        ({"nbpeft/test_x.py": ""}, {}, "wheel has nothing else"),
        ({"nbpeft/x.ipynb": ""}, {}, "wheel has nothing else"),
        ({"nbpeft/__pycache__/x.pyc": ""}, {}, "wheel has nothing else"),
        ({}, {"BRIEF.md": ""}, "source distribution"),
        ({}, {"notebooks/nbpeft_runs/a-1/facts.json": ""}, "source distribution"),
        ({"nbpeft/x.py": f"open('{PLACE}/x')"}, {}, "no path of a machine"),
        ({}, {"notebooks/01.ipynb": f"{PLACE}/x"}, "no path of a machine"),
        ({"nbpeft/x.py": TOKEN}, {}, "no access token"),
        ({}, {"notebooks/01.ipynb": TOKEN}, "no access token"),
    ],
)
def test_what_should_not_be_published_is_found(
    in_wheel: dict[str, str | None], in_sdist: dict[str, str], failed: str, tmp_path: Path
) -> None:
    assert failed_files(tmp_path, wheel_of(tmp_path, **in_wheel), in_sdist) == [failed]


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_MB", {"wheel": 0.0, "sdist": 0.0})
    assert failed_files(tmp_path, wheel_of(tmp_path), {"README.md": ""}) == ["size of the wheel", "size of the sdist"]


def test_metadata_that_is_not_the_project_s_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = checks.Report()
    tag = {f"{INFO}/WHEEL": "Tag: cp311-cp311-linux_x86_64\n"}
    checks.check_metadata(wheel_of(tmp_path, **tag), report)
    assert report.failed == ["metadata", "platforms"]
    assert "License-Expression is None; License-File is None" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "newest"),
    [
        ("# Changes\n\n## Unreleased\n\n### Added\n\n- x\n\n## 0.2.0\n", (True, "0.2.0")),
        ("# Changes\n\n## 0.3.0\n\n## 0.2.0\n", (False, "0.3.0")),
        ("# Changes\n", (False, "")),
    ],
)
def test_the_newest_changes_are_found(page: str, newest: tuple[bool, str]) -> None:
    assert checks.newest_changes(page) == newest


def test_the_changes_and_the_version_agree() -> None:
    page = (ROOT / "notebooks" / "guide" / "changes.md").read_text(encoding="utf-8")
    assert checks.newest_changes(page)[1] == checks.own_version()


@pytest.mark.parametrize(("failed", "left", "dry", "status"), [([], [], False, 0), ([], ["x"], False, 1)])
def test_only_a_dry_run_may_leave_something_to_do(failed: list[str], left: list[str], dry: bool, status: int) -> None:
    files = (ROOT / "a.whl", ROOT / "a.tar.gz")
    assert checks.conclude(checks.Report(failed, left), files, dry_run=dry) == status
    assert checks.conclude(checks.Report(failed, left), files, dry_run=True) == 0
    assert checks.conclude(checks.Report(["y"], left), files, dry_run=True) == 1


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
def test_a_release_can_be_built_and_its_wheel_runs_the_quickstart() -> None:
    command = [sys.executable, "notebooks/release_checks.py", "--dry-run", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if re.match("ok |FAILED|to do", line)]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) >= 15 and not [line for line in lines if line.startswith("FAILED")]
    assert "trained: " in lines[-1] and "2 steps" in lines[-1]
    assert f"nbpeft-{checks.own_version()}-py3-none-any.whl" in done.stdout.splitlines()[-1]
