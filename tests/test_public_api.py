"""The names of the package: all there, all lazy, all told to editors."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import nbpeft

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "bitsandbytes", "ipywidgets", "IPython")

# What a PEFT tutorial imports from ``peft``; it must run after ``s/peft/nbpeft/``.
TUTORIAL_NAMES = {
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", nbpeft.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(nbpeft, name)
    if name != "__version__" and not inspect.ismodule(value):
        assert inspect.getdoc(value), name


def test_no_name_of_a_tutorial_is_missing() -> None:
    assert set(nbpeft.__all__) >= TUTORIAL_NAMES


def test_the_names_are_those_of_the_tutorials() -> None:
    peft = pytest.importorskip("peft")
    assert [name for name in sorted(TUTORIAL_NAMES) if not hasattr(peft, name)] == []


def test_editors_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(nbpeft))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(seen) == sorted(set(nbpeft.__all__) - {"__version__"})
    assert set(nbpeft.__all__) <= set(dir(nbpeft))
    assert len(set(nbpeft.__all__)) == len(nbpeft.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = nbpeft.nothing


def test_the_version_is_that_of_the_project() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert nbpeft.__version__ == project["version"]


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(nbpeft.NbpeftError("wrong")))
    assert str(error) == "wrong"


@pytest.mark.parametrize(
    "code", ["import nbpeft", "import nbpeft; nbpeft.get_session().state; nbpeft.NbpeftError", "import nbpeft.session"]
)
def test_importing_is_light(code: str) -> None:
    assert python(f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_there_is_one_session_under_both_spellings() -> None:
    code = (
        "import nbpeft\n"
        "first = nbpeft.get_session()\n"
        "assert first is nbpeft.session()\n"
        "from nbpeft.session import Session, session\n"
        "from nbpeft import get_session, session as third\n"
        "import nbpeft.session\n"
        "assert isinstance(first, Session)\n"
        "assert first is session() is third() is nbpeft.session() is get_session() is nbpeft.get_session()\n"
        "print('same')"
    )
    assert python(code) == "same"
