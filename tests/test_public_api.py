"""The names of the package: all there, all lazy, all told to editors."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nbpeft

ROOT = Path(__file__).resolve().parent.parent

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


def test_the_stub_holds_each_name_once() -> None:
    stub = ast.parse((ROOT / "nbpeft" / "__init__.pyi").read_text(encoding="utf-8"))
    seen = [alias for node in stub.body if isinstance(node, ast.ImportFrom) and node.level for alias in node.names]
    assert all(alias.asname == alias.name for alias in seen), "type checkers take only `A as A` for a public name"
    names = [alias.name for alias in seen]
    assert len(set(names)) == len(names)
    # Configs of further methods come from the registry.
    assert {name for name in set(nbpeft.__all__) - {"__version__"} if not name.endswith("Config")} <= set(names)
    assert {*names, "__version__"} <= set(nbpeft.__all__) <= set(dir(nbpeft))
    assert len(set(nbpeft.__all__)) == len(nbpeft.__all__)


def test_type_checkers_know_every_error() -> None:
    from nbpeft import errors

    stub = (ROOT / "nbpeft" / "__init__.pyi").read_text(encoding="utf-8")
    lines = {
        f"import {name} as {name}"
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }
    assert sorted(line for line in lines if line not in stub) == [], "add them to nbpeft/__init__.pyi"


@pytest.mark.slow
def test_a_config_of_the_stub_can_be_saved_at_once(tmp_path: Path) -> None:
    code = f"import nbpeft; nbpeft.IA3Config().save_pretrained({str(tmp_path)!r}); print(nbpeft.IA3Config.__module__)"
    assert python(code) == "nbpeft.engine.methods.vectors.ia3"
    assert (tmp_path / "adapter_config.json").exists()


def test_a_star_import_gives_every_public_name() -> None:
    space: dict[str, Any] = {}
    exec("from nbpeft import *", space)
    assert set(nbpeft.__all__) <= set(space)


def test_the_config_of_a_registered_method_is_a_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbpeft.engine.contract import registry
    from nbpeft.engine.contract.adapter import Adapter

    class ToyConfig(nbpeft.PeftConfig):
        pass

    class ToyAdapter(Adapter):
        pass

    assert not hasattr(nbpeft, "ToyConfig")
    monkeypatch.setattr(registry, "_methods", [*registry.methods()])
    registry.register(ToyConfig, peft_type="TOY", label="Toy")(ToyAdapter)
    assert nbpeft.ToyConfig is ToyConfig
    assert "ToyConfig" in nbpeft.__all__ and "ToyConfig" in dir(nbpeft)
    assert nbpeft.LoraConfig is next(m.config_class for m in registry.methods() if m.peft_type == "LORA")


def test_the_examples_are_there_at_once() -> None:
    subprocess.run([sys.executable, "-c", "import nbpeft; nbpeft.examples.order_codes"], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = nbpeft.nothing


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(nbpeft.NbpeftError("wrong")))
    assert str(error) == "wrong"


def test_there_is_one_session() -> None:
    code = (
        "import nbpeft\n"
        "first = nbpeft.get_session()\n"
        "assert first is nbpeft.get_session()\n"
        "from nbpeft.session import Session, get_session as second\n"
        "from nbpeft import get_session\n"
        "import nbpeft.session\n"
        "assert isinstance(first, Session)\n"
        "assert first is second() is get_session() is nbpeft.get_session()\n"
        "print('same')"
    )
    assert python(code) == "same"
