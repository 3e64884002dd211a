"""The versions of each stack, and the table of what differs from the default environment."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.stacks import stack
from tests.stacks.stack import Outcome
from tests.test_run_commands import tests_run
from tests.wheels import ROOT

REPORT = """\
<testsuites><testsuite>
<testcase classname="tests.model.test_x.TestY" name="test_a[1-b]"/>
<testcase classname="tests.model.test_x" name="test_b"><failure message="Error: no | pipe&#10;more"/></testcase>
<testcase classname="tests.model.test_x" name="test_c"><failure message="Error: no | pipe&#10;more"/></testcase>
<testcase classname="tests.test_z" name="test_d"><skipped message="needs a GPU"/></testcase>
<testcase classname="" name="tests.test_gone"><error message="collection failure">E   first
E   ImportError: no name 'x'</error></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Outcome]:
    (tmp_path / "report.xml").write_text(REPORT, encoding="utf-8")
    return stack.read(tmp_path / "report.xml")


def test_the_command_knows_each_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(stack.STACKS) == tests_run.STACKS
    monkeypatch.setattr(sys, "argv", ["run.py", "--stack", "colab", "tests/magics", "-x"])
    arguments, rest = tests_run.parse()
    assert arguments.stack == "colab" and rest == ["tests/magics", "-x"]


def test_the_slice_is_one_quick_file() -> None:
    assert (ROOT / stack.SLICE).is_file() and "pytest.mark" not in (ROOT / stack.SLICE).read_text(encoding="utf-8")


def test_the_parts_of_a_stack_are_folders_of_tests_and_the_quick_one_leaves_the_others_out() -> None:
    quick = stack.PARTS["quick"]
    for part in stack.PARTS.values():
        assert all((ROOT / path).exists() for path in (*part.paths, *part.left_out))
        assert part is quick or set(part.paths) <= set(quick.left_out)
    assert stack.FRONTS.keys() == stack.STACKS.keys()


def test_options_of_pytest_are_not_taken_for_tests() -> None:
    assert stack.names_tests(["-x", "tests/stacks/test_stack.py::test_it"]) and stack.names_tests(["tests"])
    assert not stack.names_tests(["-x", "--timeout", "60"])


def test_the_lowest_versions_are_those_of_the_project() -> None:
    lines = stack.constraints("lowest")
    assert {"torch==2.6", "ipywidgets==7.7", "accelerate==1.3"} <= set(lines)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in (line.split("==") for line in lines if line not in stack.WITH_OLD_NUMPY):
        assert re.search(rf'"{name}>={re.escape(version)}[",]', text), name
    assert stack.constraints("newest") == []
    assert "bitsandbytes==0.50" in lines and "bitsandbytes" not in str(stack.own_requirements("colab"))


def test_what_colab_has_is_within_what_the_project_allows() -> None:
    versions = {requirement.name: requirement for requirement in map(Requirement, stack.constraints("colab"))}
    for asked in map(Requirement, stack.own_requirements("colab")):
        exact = str(versions[asked.name].specifier).removeprefix("==") if asked.name in versions else ""
        assert not exact or asked.specifier.contains(exact.replace("*", "0")), asked.name
    assert {"transformers", "ipywidgets", "numpy", "torch"} <= versions.keys()


def test_how_tests_ended_is_read(found: dict[str, Outcome]) -> None:
    assert found == {
        "tests.model.test_x.TestY::test_a[1-b]": Outcome("passed"),
        "tests.model.test_x::test_b": Outcome("failed", "Error: no | pipe"),
        "tests.model.test_x::test_c": Outcome("failed", "Error: no | pipe"),
        "tests.test_z::test_d": Outcome("skipped", "needs a GPU"),
        "tests.test_gone": Outcome("failed", "ImportError: no name 'x'"),
    }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("tests.model.test_x.TestY::test_a[1-b]", "tests/model/test_x.py::TestY::test_a"),
        ("tests.test_z::test_d", "tests/test_z.py::test_d"),
        ("tests.test_gone", "tests/test_gone.py"),
    ],
)
def test_a_test_is_named_as_pytest_takes_it(name: str, place: str) -> None:
    assert stack.place_of(name) == place


def test_only_what_ends_otherwise_is_shown_and_alike_ones_together(found: dict[str, Outcome]) -> None:
    usual = {"tests.test_z::test_d": Outcome("skipped"), "tests.model.test_x::test_b": Outcome("passed")}
    differing = stack.differences(found, usual)
    assert stack.table("colab", differing).splitlines() == [
        "| test | default | colab | why |",
        "|---|---|---|---|",
        "| tests/model/test_x.py (2 tests) | passed | failed | Error: no / pipe |",
        "| tests/test_gone.py | passed | failed | ImportError: no name 'x' |",
    ]
    assert stack.table("colab", {}) == "Nothing differs from the default stack."
