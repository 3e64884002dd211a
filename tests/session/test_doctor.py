from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch

from nbpeft.magics.front_end import front_end_checks
from nbpeft.session import doctor
from nbpeft.session.results import DoctorReport
from tests.pretend_cpu import pretend_cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [("2.5.1+cu121", "2.6", True), ("2.6.0.dev1", "2.6", False), ("2.13", "2.6", False), ("7.7", "7.7", False)],
)
def test_versions_compare_by_number(version: str, minimum: str, older: bool) -> None:
    assert doctor.older(version, minimum) is older


def installed(versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> DoctorReport:
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions.get(name, real(name))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return doctor.examine()


def test_what_is_missing_is_said_with_the_command_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = installed({"bitsandbytes": None, "torch": "2.1.0"}, monkeypatch)
    by_name = {check.name: check for check in report.problems}
    assert set(by_name) == {"bitsandbytes", "torch"}
    assert "4-bit" in by_name["bitsandbytes"].problem
    assert "pip install -U" in by_name["bitsandbytes"].remedy
    assert "bitsandbytes" in by_name["bitsandbytes"].remedy
    assert by_name["torch"].problem == "older than 2.6"
    assert "2 problems found" in str(report)
    assert "older than 2.6" in report._repr_html_()


@pytest.mark.parametrize(("version", "flawed"), [("6.31.0", False), ("7.0.1", True), ("7.3.0", True), ("7.4.0", False)])
def test_kernels_that_overlook_requests_are_named(version: str, flawed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = installed({"ipykernel": version}, monkeypatch).checks
    (check,) = (check for check in checks if check.name == "ipykernel")
    assert check.problem == ("sometimes a cell or a click is not run before 7.4" if flawed else "")


class Kernel:
    """A shell that a kernel runs, as far as the checks look."""

    kernel = object()


def test_widgets_of_another_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed({"ipywidgets": "7.7.1", "jupyterlab_widgets": "3.0.1"}, monkeypatch)
    problem = next(check for check in front_end_checks(Kernel()) if check.problem)
    assert "is incompatible with ipywidgets 7.7.1" in problem.problem


def test_no_widgets_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    installed({"ipywidgets": None}, monkeypatch)
    (problem,) = (check for check in front_end_checks(Kernel()) if check.problem)
    assert problem.optional
    assert problem.remedy.endswith("-m pip install -U ipywidgets")


def test_a_processor_without_instructions_for_half_precision_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "no instructions for bfloat16 and float16; float32 is many times faster: load models with dtype="
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = len(doctor.examine().problems)
    pretend_cpu(monkeypatch)
    report = doctor.examine()
    assert told in str(report) and told in report._repr_html_()
    assert len(report.problems) == before, "nothing is wrong"
    pretend_cpu(monkeypatch, onednn=(torch.bfloat16, torch.float16))
    assert "instructions" not in str(doctor.examine())


def test_a_gpu_that_does_not_answer_is_a_problem_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    (check,) = (check for check in doctor.examine().checks if check.name == "device")
    assert check.found == "cuda" and "does not answer (CUDA error: out of memory CUDA" in check.problem
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 10**9, 15 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    (check,) = (check for check in doctor.examine().checks if check.name == "device")
    assert check.found.startswith("Tesla T4, ") and not check.problem


def test_what_it_calls_old_is_below_the_lower_bounds_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(text for texts in project["optional-dependencies"].values() for text in texts)]
    lowest = {text.partition(">=")[0]: text.partition(">=")[2].partition(",")[0] for text in asked if ">=" in text}
    known = {need.package: need.minimum for need in doctor._NEEDS if need.package != "ipykernel"}  # older ones do run
    assert known == {package: lowest[package] for package in known}
