"""Errors and results as JSON types, for programs that read them."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import nbpeft
from nbpeft import errors
from nbpeft.display.shown import Shown
from nbpeft.jsonable import AsDict, as_json
from nbpeft.session.results.base import NotedResult, RecordResult, TracebackResult
from tests.display.samples import results

CODES = {
    "NbpeftError": "nbpeft",
    "ConfigError": "config",
    "UnknownMethodError": "unknown-method",
    "BiasError": "bias",
    "ConfigTypeError": "config-type",
    "TargetError": "target",
    "LayerKindError": "layer-kind",
    "AdapterError": "adapter",
    "UnknownAdapterError": "unknown-adapter",
    "ConversionError": "conversion",
    "AdapterExistsError": "adapter-exists",
    "MergeError": "merge",
    "CheckpointError": "checkpoint",
    "CheckpointNotFoundError": "checkpoint-not-found",
    "BaseNotFoundError": "base-not-found",
    "CorruptCheckpointError": "corrupt-checkpoint",
    "UntypedConfigError": "untyped-config",
    "PathTypeError": "path-type",
    "BaseMismatchError": "base-mismatch",
    "HotSwapError": "hot-swap",
    "NotSupportedError": "not-supported",
    "StaleModelError": "stale-model",
    "BusyError": "busy",
    "MethodCheckError": "method-check",
    "TrainingError": "training",
    "MissingPackageError": "missing-package",
    "CellError": "cell",
    "Interrupted": "interrupted",
    "TrainingInterrupted": "training-interrupted",
}
"""Programs compare with these: a code is added with its class and never changes."""

COMMANDS = [name for name in dir(nbpeft.Session) if not name.startswith("_")]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Two(AsDict):
    first: object
    second: object = dataclasses.field(default=None, compare=False)

    def __str__(self) -> str:
        return f"two: {self.first}"


class _Private(Two):
    pass


def package_classes() -> dict[str, type]:
    """Classes with fields that commands and public functions may return, and others, by name."""
    for item in pkgutil.iter_modules(nbpeft.session.results.__path__):
        importlib.import_module(f"nbpeft.session.results.{item.name}")
    for name in ("background", "doctor"):
        importlib.import_module(f"nbpeft.session.{name}")
    assert all(hasattr(nbpeft, name) for name in nbpeft.__all__)  # imports where they are
    found: dict[str, type] = {}
    waiting: list[type] = [object]
    while waiting:
        subclasses: list[type] = type.__subclasses__(waiting.pop())
        for cls in subclasses:
            if cls.__module__.startswith("nbpeft.") and dataclasses.is_dataclass(cls):
                found[cls.__name__] = cls
            waiting.append(cls) if cls.__module__.startswith("nbpeft.") else None
    return found


def error_classes() -> dict[str, Any]:
    return {cls.__name__: cls for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "code")}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": (1, 2.5, None, True)}, {"a": [1, 2.5, None, True]}),
        ([float("nan"), float("-inf")], [None, None]),
        ({3, 1, 2}, [1, 2, 3]),
        ({Colour.RED: Path("a") / "b"}, {"red": "a/b"}),
        (torch.tensor(2.5), 2.5),
        (numpy.int64(3), 3),
        (torch.float16, "torch.float16"),
        (object(), "<object>"),
        (torch.nn.Sequential(torch.nn.ReLU()), "<Sequential>"),
        (int, "int"),
        (ValueError("no"), "ValueError: no"),
        pytest.param(10**5000, "<int>", id="a long int"),
        pytest.param(Path("a" * 300), "a" * 300, id="a long path"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ({"hub_token": "secret", "pad_token": "<pad>"}, {"hub_token": "***", "pad_token": "<pad>"}),
        (Two(1, object()), {"first": 1}),
    ],
)
def test_a_value_as_json(value: object, expected: object) -> None:
    assert as_json(value) == expected
    json.dumps(as_json(value), allow_nan=False)


def test_a_list_that_contains_itself_ends() -> None:
    endless: list[object] = []
    endless.append(endless)
    json.dumps(as_json(endless))
    both: list[object] = []
    both += [both, {"both": both}, both]
    assert len(json.dumps(as_json(both))) < 500


def test_secrets_in_the_fields_of_a_dataclass_are_masked() -> None:
    @dataclasses.dataclass(frozen=True)
    class Login(AsDict):
        user: str
        api_key: str

    assert as_json([Login("me", "abc")]) == [{"user": "me", "api_key": "***"}]
    assert Login("me", "abc").to_dict()["api_key"] == "***"
    assert as_json({"answer": "use https://me:abc@host/a"}) == {"answer": "use https:/***@host/a"}


class _Fails(dict[str, int]):
    def items(self) -> Any:
        raise OSError("the file is gone")


def test_values_that_cannot_be_read_do_not_hide_the_others() -> None:
    values = as_json({"scalar": torch.empty((), device="meta"), "lazy": _Fails(a=1), "fine": 1})
    assert (values["lazy"], values["fine"]) == ("{'a': 1}", 1)
    assert values["scalar"].startswith("tensor(")


def test_a_field_called_text_is_the_printed_text() -> None:
    nothing = TracebackResult("")
    assert nothing.to_dict()["text"] == str(nothing) != ""


def test_a_result_has_its_type_its_text_and_what_it_is_compared_by() -> None:
    assert Two(1, object()).to_dict() == {"type": "Two", "text": "two: 1", "first": 1}
    assert _Private(2).to_dict()["type"] == "Two"


def test_each_error_has_a_code_that_stays() -> None:
    assert {name: cls.code for name, cls in error_classes().items()} == CODES
    raised = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, BaseException)]
    assert {cls.__name__ for cls in raised} - {"PeftWarning"} == CODES.keys()


@pytest.mark.parametrize("name", CODES)
def test_each_error_is_json_with_its_values(name: str) -> None:
    cls = error_classes()[name]
    details = {"line": 3} if name == "CellError" else {} if "Interrupted" in name else {"names": ("a", object())}
    error = cls("it is wrong", **details)
    told = json.loads(json.dumps(error.to_dict(), allow_nan=False))
    expected: dict[str, object] = {"names": ["a", "<object>"]} if "names" in details else dict(details)
    if name == "CellError":
        expected["column"] = None
    assert told == {"code": CODES[name], "type": name, "message": "it is wrong", "details": expected}


@pytest.mark.parametrize(("name", "result"), results().items(), ids=list(results()))
def test_each_result_is_json_and_one_text(name: str, result: Shown) -> None:
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["text"] == str(result) and told["type"] == type(result).__name__
    assert not re.search(r"\x1b|<div|<svg| at 0x", told["text"])
    values = dataclasses.fields(result)  # type: ignore[arg-type]
    assert {field.name for field in values if field.compare} <= told.keys()


def test_a_result_with_a_record_lists_the_attributes_of_the_record() -> None:
    shown = [result for result in results().values() if isinstance(result, RecordResult)]
    assert {type(result).__name__ for result in shown} >= {"CombineResult", "SwapResult", "MergedCopy"}
    for result in shown:
        record = getattr(result, result._RECORD)
        names = {name for name in dir(record) if not name.startswith("_")}
        assert names <= set(dir(result)) and all(hasattr(result, name) for name in names)
        with pytest.raises(AttributeError, match=f"'{type(result).__name__}' object has no attribute 'no_such'"):
            _ = result.no_such


def test_everything_that_is_shown_has_a_text_of_its_own() -> None:
    shown = [cls for cls in package_classes().values() if issubclass(cls, Shown)]
    assert len(shown) > 30
    assert {cls.__name__ for cls in shown if cls.__str__ is Shown.__str__} == {"Result"}
    noted = [cls for cls in shown if cls.__str__ is NotedResult.__str__]
    without = {cls.__name__ for cls in noted if cls._what is NotedResult._what}
    assert len(noted) > 10 and without == {"NotedResult", "ModelResult", "RecordResult"}


def test_everything_that_functions_and_commands_return_can_be_read_as_json() -> None:
    """A dataclass of the package with a text of its own, which a public function or a command returns."""
    classes = package_classes()
    public = [getattr(nbpeft, name) for name in nbpeft.__all__]
    functions = [*public, *(getattr(nbpeft.Session, name) for name in COMMANDS), nbpeft.AdapterPool.statistics]
    returned = {
        name
        for function in functions
        for name in re.findall(r"\w+", str(getattr(function, "__annotations__", {}).get("return", "")))
        if name in classes and {"__str__", "_what"} & vars(classes[name]).keys()
    }
    assert {"TrainResult", "ScoreResult", "MergedFolder", "SaveResult", "PlanResult"} <= returned
    assert [name for name in returned if not issubclass(classes[name], AsDict)] == []
    results_of = {nbpeft.Session.memory: "MemoryState", nbpeft.Session.measure: "MemoryState"}
    for function, name in results_of.items():
        assert name in function.__annotations__["return"] and issubclass(classes[name], AsDict)
