"""The classes of errors, and the page that lists them for users."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import nbpeft
from nbpeft import errors
from nbpeft.errors import Interrupted, NbpeftError, TrainingInterrupted
from nbpeft.magics.lora import SUBCOMMANDS
from nbpeft.magics.parse import parse_arguments
from nbpeft.magics.tokenize import tokenize
from tests.tiny_models import llama

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "notebooks" / "guide" / "errors.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \| ", PAGE, re.MULTILINE))
"""Code -> message, of the page's table."""
SIGNALS = {"StopRun", "NotSplittableError"}
"""Exceptions that nbpeft catches itself, in another module than it raises them in."""

CLASSES: list[Any] = [value for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "code")]


def exceptions_of_the_package() -> set[str]:
    """Names of all classes in the sources that derive, through others or not, from an exception of Python."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for path in (ROOT / "nbpeft").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    python = {name for name, value in vars(builtins).items() if isinstance(value, type)}
    known = {name for name in python if issubclass(getattr(builtins, name), BaseException)}
    while more := {name for name in bases.keys() - known if bases[name] & known}:
        known |= more
    return known - python


def test_every_error_derives_from_one_class() -> None:
    interruptions = {Interrupted, TrainingInterrupted}
    others = {kind for kind in CLASSES if not issubclass(kind, NbpeftError)}
    assert others == interruptions
    assert all(issubclass(kind, KeyboardInterrupt) for kind in interruptions)
    public = {name for name in exceptions_of_the_package() if not name.startswith("_")}
    assert public - SIGNALS == {kind.__name__ for kind in CLASSES} | {"PeftWarning"}


def test_the_page_has_every_code() -> None:
    raised = {kind.code for kind in CLASSES} - {NbpeftError.code}
    assert TABLE.keys() == raised | {"unexpected"}


def _adapted(*names: str) -> Any:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=4), names[0])
    for name in names[1:]:
        model.add_adapter(name, nbpeft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    return model


def _saved(**changed: str) -> None:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "./gone"
    model.save_pretrained("saved")
    for name, text in changed.items():
        (found,) = Path("saved").glob(f"{name}.*")
        found.write_text(text)


def _merged() -> None:
    model = _adapted("sql")
    model.merge_adapter()
    nbpeft.reduce_intruder_dimension(model, "sql")


def _unloaded() -> None:
    model = _adapted("sql")
    model.unload()
    model.set_adapter("sql")


def _loaded(model: nn.Module, **changed: str) -> None:
    _saved(**changed)
    nbpeft.PeftModel.from_pretrained(model, "saved")


def _base_is_gone() -> None:
    _saved()
    nbpeft.AutoPeftModelForCausalLM.from_pretrained("saved")


def _patched() -> None:
    nbpeft.LoraModel._create_new_module = None


def _converted() -> None:
    config = nbpeft.LNTuningConfig(target_modules=["input_layernorm"])
    nbpeft.convert_to_lora(nbpeft.get_peft_model(llama(), config), 4)


def _grouped() -> None:
    config = nbpeft.AdaLoraConfig(target_modules=["0"], total_step=9)
    nbpeft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), config)


def _swapped() -> None:
    nbpeft.hotswap_adapter_from_state_dict(_adapted("sql"), {}, "sql", nbpeft.VeraConfig())


ROWS = [{"prompt": "a", "completion": "b"}]
CAUSES: dict[str, Callable[[], Any]] = {
    "config": lambda: nbpeft.LoraConfig(r=0),
    "config-type": lambda: nbpeft.LoraConfig(use_dora="no"),  # type: ignore[arg-type]
    "bias": lambda: nbpeft.LoraConfig(bias="every"),
    "unknown-method": lambda: nbpeft.get_peft_config({"peft_type": "LORAX"}),
    "target": lambda: nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(target_modules=["q_projj"])),
    "layer-kind": _grouped,
    "adapter": lambda: _adapted("sql", "rows").add_weighted_adapter(["sql", "rows"], [1, 1], "both"),
    "unknown-adapter": lambda: _adapted("sql").set_adapter("sqk"),
    "adapter-exists": lambda: _adapted("sql").add_adapter("sql", nbpeft.LoraConfig()),
    "conversion": _converted,
    "merge": _merged,
    "hot-swap": _swapped,
    "stale-model": _unloaded,
    "checkpoint": lambda: _adapted("sql").save_pretrained(""),
    "checkpoint-not-found": lambda: nbpeft.PeftModel.from_pretrained(llama(), "./nowhere"),
    "base-not-found": _base_is_gone,
    "base-mismatch": lambda: _loaded(nn.Sequential(nn.Linear(3, 3))),
    "corrupt-checkpoint": lambda: _loaded(llama(), adapter_model="cut off"),
    "untyped-config": lambda: _loaded(llama(), adapter_config="{}"),
    "path-type": lambda: nbpeft.PeftModel.from_pretrained(llama(), None),  # type: ignore[arg-type]
    "training": lambda: nbpeft.train(llama(), ROWS),
    "not-supported": _patched,
    "cell": lambda: parse_arguments(SUBCOMMANDS["undo"], "%lora undo", tokenize("x"), {}),
}
"""Code -> a call that ends with this error."""


@pytest.mark.parametrize("code", CAUSES)
def test_an_error_of_the_page_has_its_code_and_message(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NbpeftError) as raised:
        CAUSES[code]()
    assert raised.value.code == code
    beginning, _, _ = TABLE[code].partition(" …")
    assert raised.value.message.startswith(beginning.removesuffix("Did you mean 'q_proj' or"))
