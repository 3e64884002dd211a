"""The two commands of a fresh machine, and the environment they make."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from tests import effort

ROOT = Path(__file__).resolve().parent.parent


def script(folder: str, name: str) -> ModuleType:
    """A script of the project as a module, its folder on the path while it is loaded."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(ROOT / "notebooks"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "notebooks"))
    return module


environment = script("notebooks", "environment")
execute = script("notebooks", "execute")
notebook_run = script("notebooks", "run")
tests_run = script("tests", "run")


@pytest.mark.parametrize("path", ["notebooks/environment.py", "notebooks/run.py", "tests/run.py"])
def test_an_old_python_can_parse_what_tells_it_that_it_is_old(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))
    top_imports = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert top_imports <= {
        *sys.stdlib_module_names,
        "environment",
        "collections.abc",
        "concurrent.futures",
        "xml.etree.ElementTree",
    }


@pytest.mark.parametrize(("user", "options"), [(0, ["--allow-root"]), (1000, [])])
def test_the_lab_starts_as_root_too(monkeypatch: pytest.MonkeyPatch, user: int, options: list[str]) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(notebook_run.os, "geteuid", lambda: user, raising=False)
    monkeypatch.setattr(notebook_run.environment, "ensure", lambda extra: Path("python"))
    monkeypatch.setattr(notebook_run, "call", lambda command: called.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["run.py", "--lab"])
    assert notebook_run.main() == 0
    assert called[0][4:] == options


def test_an_old_python_is_told_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer, and this is Python 3\.9\.2"):
        environment.require_python()


class FakeInstaller:
    """Stands for pip: notes what it was asked to install."""

    def __init__(self) -> None:
        self.installed: list[str] = []
        self.fails = False

    def __call__(self, venv: Path, command: Sequence[str]) -> None:
        self.installed.append(command[-1])
        if self.fails:
            raise environment.SetupError("no network")


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> FakeInstaller:
    fake = FakeInstaller()
    monkeypatch.setattr(environment, "_install", fake)
    monkeypatch.setattr(environment, "_pip_command", lambda venv: ["pip"])
    return fake


@pytest.mark.slow
def test_the_environment_is_made_once_and_found_again(installer: FakeInstaller, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = environment.ensure("tutorials", venv)
    assert python.exists()
    assert installer.installed == [".[tutorials]", *environment.MODEL_PACKAGES]
    environment.ensure("tutorials", venv)
    assert len(installer.installed) == 2
    environment.ensure("test", venv)
    assert installer.installed[2] == ".[test]"
    environment.ensure("tutorials", venv)
    assert len(installer.installed) == 4


@pytest.mark.slow
def test_an_interrupted_setup_is_taken_up_again(installer: FakeInstaller, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    environment.ensure("test", venv)
    environment._stamp_path(venv).unlink()
    installer.fails = True
    with pytest.raises(environment.SetupError):
        environment.ensure("test", venv)
    installer.fails = False
    before = len(installer.installed)
    environment.ensure("test", venv)
    assert len(installer.installed) == before + 2
    environment.venv_python(venv).unlink()
    assert environment.ensure("test", venv).exists()


def test_other_dependencies_are_installed_and_other_lint_rules_are_not(
    installer: FakeInstaller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (project / "pyproject.toml").write_text(text, encoding="utf-8")
    (project / "nbpeft").mkdir()
    (project / "nbpeft" / "__init__.py").write_text('__version__ = "1.0"\n', encoding="utf-8")
    monkeypatch.setattr(environment, "ROOT", project)
    first = environment._fingerprint("3.11")
    (project / "pyproject.toml").write_text(text.replace("max-complexity = 12", "max-complexity = 13"))
    assert environment._fingerprint("3.11") == first
    (project / "pyproject.toml").write_text(text.replace('"psutil>=5.9.3"', '"psutil>=5.8"'))
    assert environment._fingerprint("3.11") != first
    (project / "pyproject.toml").write_text(text)
    assert environment._fingerprint("3.12") != first
    (project / "nbpeft" / "__init__.py").write_text('__version__ = "1.1"\n', encoding="utf-8")
    assert environment._fingerprint("3.11") != first


def test_packages_that_were_cut_off_are_forgotten(tmp_path: Path) -> None:
    library = tmp_path / ("Lib/site-packages" if sys.platform == "win32" else "lib/python3.11/site-packages")
    for name, complete in (("whole-1.dist-info", True), ("half-1.dist-info", False), ("~olf", False)):
        (library / name).mkdir(parents=True)
        if complete:
            (library / name / "RECORD").touch()
    environment._drop_half_installed(tmp_path)
    assert [path.name for path in library.iterdir()] == ["whole-1.dist-info"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("WARNING: Retrying: NewConnectionError", "index cannot be reached"),
        ("ERROR: No matching distribution found for x (from versions: none)", "index cannot be reached"),
        ("noise\n  OSError: Readme file does not exist: README.md", "Readme file does not exist"),
    ],
)
def test_a_failed_installation_says_why(said: str, message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"print({said!r}); raise SystemExit(1)"]
    with pytest.raises(environment.SetupError, match=message):
        environment._install(tmp_path, command)
    assert said in (tmp_path / "nbpeft-setup.log").read_text(encoding="utf-8")


def test_a_notebook_is_found_by_name_number_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("01_first", "02_second", "02_second_more"):
        (tmp_path / f"{name}.ipynb").touch()
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "a_task.ipynb").touch()
    monkeypatch.setattr(notebook_run, "NOTEBOOKS", tmp_path)
    find = notebook_run.find
    assert find("02").name == "02_second.ipynb"
    assert find("02_second_more").name == "02_second_more.ipynb"
    assert find(str(tmp_path / "01_first.ipynb")).name == "01_first.ipynb"
    assert find("a_task") == tmp_path / "gallery" / "a_task.ipynb"
    assert find("03") is None


def notebook_of(*cells: tuple[str, bool]) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook()
    for source, tagged in cells:
        cell = nbformat.v4.new_code_cell(source)
        if tagged:
            cell.metadata["tags"] = ["summary"]
        notebook.cells.append(cell)
    return notebook


@pytest.mark.slow
def test_a_notebook_is_executed_and_its_summary_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.ipynb"
    nbformat.write(notebook_of(("loss = 0.25", False), ("print(f'final loss: {loss}')", True)), path)
    out = tmp_path / "out"
    out.mkdir()
    assert run_execute(path, out) == 0
    printed = capsys.readouterr().out
    assert "final loss  0.25" in printed
    assert "[2/2] print" in printed
    assert "final loss: 0.25" in (out / "small.html").read_text(encoding="utf-8")
    assert nbformat.read(out / "small.ipynb", as_version=4).cells[1].outputs[0].text == "final loss: 0.25\n"


@pytest.mark.slow
def test_a_notebook_that_fails_is_saved_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.ipynb"
    nbformat.write(notebook_of(("print('one: 1')", False), ("1 / 0", False)), path)
    out = tmp_path / "out"
    out.mkdir()
    assert run_execute(path, out) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert nbformat.read(out / "small.ipynb", as_version=4).cells[0].outputs[0].text == "one: 1\n"


def run_execute(path: Path, out: Path) -> int:
    before = sys.argv
    sys.argv = ["execute.py", str(path), str(out)]
    try:
        return execute.main()
    finally:
        sys.argv = before


def test_key_values_are_taken_from_text_and_results_alone() -> None:
    cell = nbformat.v4.new_code_cell("")
    cell.outputs = [
        nbformat.v4.new_output("stream", text="final loss: \x1b[1m0.25\x1b[0m\nno pair here\nhttps://x.y: no\n"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "trainable: 1.2 %"}),
        nbformat.v4.new_output("error", ename="E", evalue="v", traceback=["a: b"]),
    ]
    assert execute.key_values(cell) == [("final loss", "0.25"), ("trainable", "1.2 %")]


def chosen(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    options, rest = tests_run.parse()
    return [part.title for part in tests_run.chosen_parts(options, rest, None)]


def test_each_python_has_an_environment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.venv_of("3.13") == tmp_path / ".venv"
    (tmp_path / ".venv").mkdir()
    for line in ("version = 3.11.7", "version_info = 3.11.7"):
        (tmp_path / ".venv" / "pyvenv.cfg").write_text(f"home = /usr/bin\n{line}\n", encoding="utf-8")
        assert environment.venv_of("3.11") == tmp_path / ".venv"
        assert environment.venv_of("3.13") == tmp_path / ".venv-3.13"


def test_all_runs_a_slice_with_the_other_pythons_that_have_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {version: tmp_path / version for version in environment.PYTHONS}
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    other, bare = [version for version in places if version != own][:2]
    monkeypatch.setattr(tests_run.environment, "VENV", places[own])
    monkeypatch.setattr(tests_run.environment, "venv_of", places.__getitem__)
    monkeypatch.setattr(tests_run.environment, "is_made", lambda venv: venv == places[other])
    monkeypatch.setattr(tests_run.shutil, "which", lambda name: name if name.endswith((own, other, bare)) else None)
    (part,) = tests_run.python_parts()
    assert part.title == f"Python {other}" and part.python == environment.venv_python(places[other])
    assert capsys.readouterr().out.startswith(f"Python {bare} is left out: python{bare} tests/run.py")
    assert all((ROOT / path).exists() for path in tests_run.PYTHON_SLICE)


def test_options_choose_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests_run, "python_parts", list)
    lint = ["ruff check", "ruff format", "mypy", "import contracts"]
    assert chosen(monkeypatch=monkeypatch) == [*lint, "quick tests", "slow tests"]
    assert chosen("--only", "lint", monkeypatch=monkeypatch) == lint
    assert chosen("--only", "slow", monkeypatch=monkeypatch) == ["slow tests"]
    assert chosen("-k", "merge", monkeypatch=monkeypatch) == ["quick tests", "slow tests"]
    assert chosen("--only", "unit", "-x", monkeypatch=monkeypatch) == ["quick tests"]
    stacks = ["stack lowest", "stack colab", "stack newest"]
    assert chosen("--all", monkeypatch=monkeypatch) == [*lint, "quick tests", "slow tests", "oldest kernels", *stacks]
    assert chosen("--all", "--kernels", "sse", monkeypatch=monkeypatch) == [*lint, "quick tests", "slow tests", *stacks]
    assert chosen("--all", "tests/magics", monkeypatch=monkeypatch) == ["quick tests", "slow tests"]


def slow_marks(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Which slow tests are asked for, and the tier that the tests are told."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    options, rest = tests_run.parse()
    part = tests_run.test_parts(options, rest, None)[1]
    return part.command[part.command.index("-m", 2) + 1], part.variables["NBPEFT_TESTS"]


def test_slow_tests_run_in_slices_until_all_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    every = "(slow or browser) and not long"
    assert slow_marks(monkeypatch=monkeypatch) == (f"{every} and slice", "quick")
    assert slow_marks("-n", "0", "-x", monkeypatch=monkeypatch) == (f"{every} and slice", "quick")
    assert slow_marks("--all", monkeypatch=monkeypatch) == (every, "all")
    assert slow_marks("--long", monkeypatch=monkeypatch) == ("(slow or browser or long)", "long")
    assert slow_marks("--all", "--no-browser", monkeypatch=monkeypatch) == (f"{every} and not browser", "all")
    assert slow_marks("-k", "merge", monkeypatch=monkeypatch) == (every, "quick")
    assert slow_marks("tests/test_gpu.py::test_on_a_gpu", monkeypatch=monkeypatch) == (every, "quick")


def test_slow_tests_are_looked_for_in_the_files_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        part = tests_run.test_parts(*tests_run.parse(), None)[1]
        return [argument for argument in part.command if argument.endswith(".py")]

    assert "tests/browser/test_panels.py" in files() and "tests/test_matrix.py" not in files()
    assert {*files(), "tests/test_gpu.py"} < {*files("--all")} and "tests/test_matrix.py" not in files("--all")
    assert files("-k", "panel") == []
    assert files("tests/test_gpu.py") == files("--all", "tests/test_gpu.py") == ["tests/test_gpu.py"]


@pytest.mark.parametrize("path", ["tests/modle", "tests/model/test_none.py", "test_none.py::test_x"])
def test_a_path_that_is_not_there_is_an_error(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "-x", "tests/model", path])
    with pytest.raises(SystemExit) as ended:
        tests_run.parse()
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(f"there is no {path}")


def test_paths_and_values_of_options_go_to_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["-n", "0", "tests/test_gpu.py::test_on_a_gpu", "--durations", "5"]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    assert tests_run.parse()[1] == given


@pytest.mark.slow
def test_every_kind_of_slow_tests_has_a_slice() -> None:
    options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "(slow or browser) and slice"]
    options += tests_run.files_with("slow and slice")
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    chosen = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert chosen >= {
        "tests/browser/test_kernel_matrix.py",
        "tests/browser/test_panels.py",
        "tests/model/test_real_model.py",
        "tests/training/launch/test_launch.py",
    }


def test_each_tier_has_what_the_one_before_has(monkeypatch: pytest.MonkeyPatch) -> None:
    points = range(1000)
    chosen = {}
    for tier in effort.TIERS:
        monkeypatch.setattr(effort, "TIER", tier)
        chosen[tier] = (effort.effort(5, full=50, long=500), effort.effort(5), effort.drawn(points, 5))
    assert [chosen[tier][:2] for tier in effort.TIERS] == [(5, 5), (50, None), (500, None)]
    assert len(chosen["quick"][2]) == 5 and chosen["all"][2] == chosen["long"][2] == list(points)
    monkeypatch.setattr(effort, "TIER", "quick")
    assert effort.drawn(points, 5) == chosen["quick"][2] != effort.drawn(points, 5, seed=1)
    assert effort.drawn(points[:3], 5) == [0, 1, 2]


@pytest.fixture
def part(tmp_path: Path) -> Callable[..., object]:
    def make(status: int, **counts: int) -> object:
        made = tests_run.Part("tests", [], "do this", report=tmp_path / "report.xml")
        made.status, made.counts = status, counts
        return made

    return make


def test_the_end_tells_the_counts_and_the_truth(
    part: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tests_run.conclude([part(0, passed=3, failed=0, skipped=1), part(0, passed=2, failed=0, skipped=0)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 passed, 0 failed, 1 skipped"
    assert tests_run.conclude([part(1, passed=3, failed=1, skipped=0), part(5)]) == 1
    assert "tests failed: do this." in capsys.readouterr().out
    assert tests_run.conclude([part(5), part(5)]) == 1
    assert "No test ran" in capsys.readouterr().out


def test_counts_come_from_pytests_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    suite = '<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>'
    report.write_text(suite, encoding="utf-8")
    assert tests_run.read_counts(report) == {"passed": 3, "failed": 3, "skipped": 3}


def test_the_slowest_files_are_told(
    part: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.xml"
    cases = "".join(
        f'<testcase classname="tests.{name}" name="test" time="{seconds}"/>'
        for name, seconds in (("model.test_b", 2.5), ("test_a.TestOne", 1), ("model.test_b", 70))
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    ran = part(0, passed=3, failed=0, skipped=0)
    ran.files = tests_run.read_files(report)  # type: ignore[attr-defined]
    assert tests_run.conclude([ran]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in told[-5:-2]] == [
        "slowest files",
        "1 min 12 s  tests/model/test_b.py",
        "1.0 s  tests/test_a.py",
    ]
    assert told[-1] == "3 passed, 0 failed, 0 skipped"


def test_a_part_runs_in_the_environment_and_its_status_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import os, sys; sys.exit(3 if os.environ['GIVEN'] == 'yes' and 'PYTHONPATH' not in os.environ else 0)"
    made = tests_run.Part("part", ["-c", code], "do this", variables={"GIVEN": "yes"})
    tests_run.run(made, Path(sys.executable))
    assert made.status == 3
    assert made.failed


def test_the_browser_named_in_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = tmp_path / "browser"
    browser.touch(mode=0o755)
    monkeypatch.setenv("CHROMIUM", str(browser))
    assert tests_run.browser_here(Path(sys.executable)) == str(browser)


def test_the_stamp_is_written_whole(tmp_path: Path) -> None:
    environment._write_stamp(tmp_path, {"extras": ["test"]})
    assert json.loads(environment._stamp_path(tmp_path).read_text()) == {"extras": ["test"]}
    environment._stamp_path(tmp_path).write_text('{"extras": [')
    assert environment._read_stamp(tmp_path) == {}


def test_the_ci_script_runs_the_tests_and_hides_nothing() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-1] == 'python3 tests/run.py --all "$@"'


def test_what_runs_aside_is_shown_when_the_others_are_through(capfd: pytest.CaptureFixture[str]) -> None:
    types = tests_run.Part("types", ["-c", "print('a type'); raise SystemExit(3)"], "mend it", aside=True)
    tests = tests_run.Part("tests", ["-c", "print('a test')"], "mend them")
    tests_run.run_all([types, tests], Path(sys.executable))
    assert (types.status, tests.status) == (3, 0) and types.seconds > 0
    printed = capfd.readouterr().out
    assert printed.index("› tests") < printed.index("a test") < printed.index("› types") < printed.index("a type")
