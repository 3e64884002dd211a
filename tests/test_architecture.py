"""What the import contracts in pyproject.toml cannot say, and a proof that they bite."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbpeft"
FOLDERS = ("nbpeft", "notebooks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_FILE_LINES = 700
MOST_BODY_LINES = 60
TEXT_SUFFIXES = {".py", ".md", ".toml", ".ipynb", ".json", ".css", ".html", ".svg", ".cfg", ".txt", ".yml", ".yaml"}


def run_python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(code: str, names: set[str]) -> set[str]:
    """Which of the named packages a fresh interpreter has loaded after running the code."""
    report = f"import sys; print('LOADED', *(name for name in {sorted(names)!r} if name in sys.modules))"
    last_line = run_python(f"{code}\n{report}").splitlines()[-1]
    assert last_line.startswith("LOADED")
    return set(last_line.split()[1:])


HEAVY = {"torch", "transformers", "bitsandbytes", "ipywidgets", "safetensors", "accelerate", "matplotlib", "peft"}


def test_importing_the_package_loads_neither_torch_nor_a_front_end() -> None:
    assert imported_by("import nbpeft", HEAVY | {"IPython", "numpy"}) == set()


def test_loading_the_extension_loads_neither_torch_nor_widgets() -> None:
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.run_line_magic('load_ext', 'nbpeft')\n"
        "assert {'lora', 'lora_train'} <= set(shell.magics_manager.magics['cell'])"
    )
    assert imported_by(code, HEAVY) == set()


def test_the_engine_needs_torch_alone() -> None:
    others = HEAVY - {"torch"} | {"IPython"}
    assert imported_by("import nbpeft.engine.manager", others) == set()


def test_the_version_is_the_packages() -> None:
    import nbpeft

    assert nbpeft.__version__ == importlib.metadata.version("nbpeft")


@pytest.mark.parametrize("folder", ["methods", "hosts", "backends"])
def test_every_file_registers_exactly_one(folder: str) -> None:
    from nbpeft.engine import registry

    registered: dict[str, list[type]] = {
        "methods": [method.adapter_class for method in registry.methods()],
        "hosts": [type(host) for host in registry.hosts()],
        "backends": [type(backend) for backend in registry.backends()],
    }
    prefix = f"nbpeft.engine.{folder}."
    counts = Counter(cls.__module__ for cls in registered[folder] if cls.__module__.startswith(prefix))
    files = {prefix + path.stem for path in (PACKAGE / "engine" / folder).glob("*.py") if path.stem != "__init__"}
    assert counts == dict.fromkeys(files, 1)


def test_files_and_functions_are_short() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}
    counts = {path: len(text.splitlines()) for path, text in texts.items()}
    assert not {path: lines for path, lines in counts.items() if lines >= MOST_FILE_LINES}
    long = [
        (path, name, lines)
        for path, text in texts.items()
        for name, lines in body_lengths(ast.parse(text))
        if lines >= MOST_BODY_LINES
    ]
    assert not long


def body_lengths(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every function's name and its lines without signature and docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_body_lengths_leaves_docstrings_out() -> None:
    tree = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n\n\ndef g(): pass\n')
    assert dict(body_lengths(tree)) == {"f": 2, "g": 1}


def project_files() -> list[Path]:
    """The files that belong to the project, as git sees them where it is there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    slash = "/"  # so that this file does not name one either
    places = re.compile(rf"(?<![\w.]){slash}(root|work|opt{slash}wheels|home{slash}\w+|Users{slash}\w+){slash}")
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in project_files()
        if path.suffix in TEXT_SUFFIXES
        for match in places.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert not found


HEADLESS = ("checkpoint", "engine", "memory", "model", "session", "training")
MAGIC_SPELLING = re.compile(r"%%?q?lora|[(,] ?--(?!jp-)[a-z]")


def test_nothing_below_the_magics_speaks_of_magics() -> None:
    """A script is never told to type ``%lora`` or ``--name``; ``magics/cell_spelling.py`` adds that in a cell."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in HEADLESS
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MAGIC_SPELLING.search(line)
    ]
    assert not found


def test_the_top_level_is_fixed() -> None:
    allowed = {"LICENSE", "README.md", "nbpeft", "notebooks", "pyproject.toml", "tests"}
    tops = {path.relative_to(ROOT).parts[0] for path in project_files()}
    assert {top for top in tops if not top.startswith(".")} == allowed


HEADLESS = ("checkpoint", "engine", "memory", "model", "session", "training")


def test_headless_layers_hold_no_html() -> None:
    html = re.compile(r"<div|<table|_html\b|var\(--jp")
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for layer in HEADLESS
        for path in (PACKAGE / layer).rglob("*.py")
        for match in html.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found


VIOLATIONS = {
    "layers": ("engine/adapter.py", "import nbpeft.model", "nbpeft.engine.adapter -> nbpeft.model"),
    "headless": ("engine/adapter.py", "def f(): import IPython", "nbpeft.engine.adapter -> IPython"),
    "described": (
        "session/core.py",
        "import nbpeft.display.html",
        "nbpeft.session.core -> nbpeft.display.html",
    ),
    "through-session": ("widgets/__init__.py", "import nbpeft.engine.plan", "nbpeft.widgets -> nbpeft.engine.plan"),
    "engine-layers": ("engine/targets.py", "import nbpeft.engine.plan", "nbpeft.engine.targets -> nbpeft.engine.plan"),
    "methods-independent": (
        "engine/methods/lora.py",
        "import nbpeft.engine.methods.dora",
        "nbpeft.engine.methods.lora -> nbpeft.engine.methods.dora",
    ),
    "backends-independent": (
        "engine/backends/dense.py",
        "import nbpeft.engine.backends.bnb4bit",
        "nbpeft.engine.backends.dense -> nbpeft.engine.backends.bnb4bit",
    ),
    "files": ("engine/adapter.py", "import safetensors", "nbpeft.engine.adapter -> safetensors"),
    "no-cycles": ("engine/adapter.py", "import nbpeft.engine.plan", "nbpeft.engine"),
    "no-root": ("engine/adapter.py", "from nbpeft import __version__", "nbpeft.engine.adapter -> nbpeft"),
    "no-peft": ("checkpoint/__init__.py", "def f(): import peft", "nbpeft.checkpoint -> peft"),
}


def lint_imports(copy: Path, contract: str) -> tuple[int, str]:
    """Checks one contract on a copy of the package."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(limit_to_contracts=(%r,)))"
    done = subprocess.run(
        [sys.executable, "-c", code % contract],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "400"},
        capture_output=True,
        text=True,
    )
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "nbpeft", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_every_contract_has_a_violation_here() -> None:
    import tomllib

    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {contract["id"] for contract in tables["tool"]["importlinter"]["contracts"]} == set(VIOLATIONS)


@pytest.mark.parametrize("contract", VIOLATIONS)
def test_a_violated_contract_is_caught(contract: str, package_copy: Path) -> None:
    file, statement, complaint = VIOLATIONS[contract]
    assert complaint not in lint_imports(package_copy, contract)[1]
    with (package_copy / "nbpeft" / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{statement}\n")
    status, output = lint_imports(package_copy, contract)
    assert status == 1
    assert complaint in output


@pytest.mark.parametrize(("contract", "file"), [("layers", "helpers.py"), ("engine-layers", "engine/utils.py")])
def test_a_module_without_a_layer_is_caught(contract: str, file: str, package_copy: Path) -> None:
    (package_copy / "nbpeft" / file).write_text('"""Odds and ends."""\n', encoding="utf-8")
    status, output = lint_imports(package_copy, contract)
    assert status == 1
    assert Path(file).stem in output
