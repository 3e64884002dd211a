"""What only a part of nbpeft needs: the engine works without it, and one line says what to install."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nbpeft._util.optional import needs
from nbpeft.errors import MissingPackageError
from tests import engine_alone

ROOT = Path(__file__).resolve().parent.parent
OF_EXTRAS = (
    "IPython",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "ipykernel",
    "ipywidgets",
    "peft",
    "rich",
    "traitlets",
)


@pytest.mark.slow
def test_the_engine_needs_none_of_what_notebooks_and_trainings_need() -> None:
    script = [sys.executable, engine_alone.__file__, *OF_EXTRAS]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["ok"], done.stderr


CALLS = f"""
import sys
from tests.engine_alone import Without
sys.meta_path[:] = [Without(finder, {OF_EXTRAS}) for finder in sys.meta_path]
import nbpeft
from tests.tiny_models import adapted, llama
for call in (
    lambda: nbpeft.train(adapted(), [dict(input_ids=[1, 2])]),
    lambda: nbpeft.quantize_model(llama()),
    lambda: str(nbpeft.get_session().doctor()),
):
    try:
        call()
    except nbpeft.MissingPackageError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_is_missing_is_said_in_one_line_with_the_extra() -> None:
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "Training needs accelerate: pip install 'nbpeft[train]'",
        "Quantizing needs bitsandbytes: pip install 'nbpeft[bnb]'",
        "A result as text needs rich: pip install 'nbpeft[notebook]'",
    ], done.stderr


def test_a_package_of_no_extra_is_named_itself() -> None:
    with (
        pytest.raises(
            MissingPackageError, match=r"^Reading rows.parquet needs pyarrow: pip install pyarrow$"
        ) as caught,
        needs("pyarrow", "Reading rows.parquet"),
    ):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    assert caught.value.details == {"package": "pyarrow"}


def test_a_broken_package_is_told_from_one_that_is_absent() -> None:
    said = r"^Quantizing needs bitsandbytes \(libcudart is missing\): pip install"
    with pytest.raises(ImportError, match=said), needs("bitsandbytes", "Quantizing"):
        raise ImportError("libcudart is missing")


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), needs("torch", "Everything"):
        _ = 1 / 0


def test_only_front_ends_and_trainings_import_what_extras_bring() -> None:
    """At the top of a module: inside functions an import is asked for by what needs it."""
    needed = ("magics", "widgets", "training", "display/text.py")
    for path in (ROOT / "nbpeft").rglob("*.py"):
        place = path.relative_to(ROOT / "nbpeft").as_posix()
        if not place.startswith(needed):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
            assert not {name.partition(".")[0] for name in names} & set(OF_EXTRAS), place
