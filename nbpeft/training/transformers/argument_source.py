"""The fields of ``TrainingArguments``, read from its source: importing it takes a second or two if PEFT is installed.

Tab completion has to respond within a second, and should not import other packages.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

NOTEBOOK_DEFAULTS: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "train_sampling_strategy": "group_by_length",
}
"""The defaults in a notebook that differ from those of ``TrainingArguments``."""

OTHER_NAMES: dict[str, str] = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "steps": "max_steps",
    "total_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "evaluation_strategy": "eval_strategy",
    "output": "output_dir",
    "max_seq_length": "max_length",
}
"""Common wrong names -> the field that is meant, where spelling alone does not suggest it."""

_CLASSES = ("training_args.py", "trainer_utils.py")
"""The files of transformers with ``TrainingArguments`` and the enums of its fields."""
_TRACKERS = ("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")


class Argument(NamedTuple):
    """A field of ``TrainingArguments``.

    Attributes:
        name: its name.
        kind: its type as Python source; ``str`` for an enum.
        default: its default as Python source.
        help: its description.
        choices: its possible values, if they can be listed.
    """

    name: str
    kind: str
    default: str
    help: str
    choices: tuple[Any, ...]


@functools.cache
def training_arguments() -> tuple[Argument, ...]:
    """The fields of ``TrainingArguments``, in its order; empty if transformers is not installed."""
    classes = {node.name: node for file in _CLASSES for node in _parsed(file) if isinstance(node, ast.ClassDef)}
    enums = {name: members for name, node in classes.items() if (members := _members(node))}
    body = classes["TrainingArguments"].body if "TrainingArguments" in classes else []
    return tuple(_argument(node, body, enums) for node in body if isinstance(node, ast.AnnAssign) and _given(node))


@functools.cache
def tracker_names() -> tuple[str, ...]:
    """The values of ``report_to`` other than ``none`` and ``all``."""
    file, name = _TRACKERS
    for node in _parsed(file):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Dict):
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    return ()


def _parsed(file: str) -> list[ast.stmt]:
    found = importlib.util.find_spec("transformers")
    path = Path(found.submodule_search_locations[0], file) if found and found.submodule_search_locations else None
    return ast.parse(path.read_text(encoding="utf-8")).body if path is not None and path.is_file() else []


def _members(node: ast.ClassDef) -> dict[str, str]:
    """Member of an enum -> its value; empty for a class that is not an enum."""
    if not any("Enum" in ast.unparse(base) for base in node.bases):
        return {}
    assigned = [item for item in node.body if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)]
    return {ast.unparse(item.targets[0]): str(_literal(item.value)) for item in assigned}


def _given(node: ast.AnnAssign) -> bool:
    """Whether a field is an argument of ``__init__``."""
    off = _keywords(node.value).get("init")
    return "ClassVar" not in ast.unparse(node.annotation) and (off is None or _literal(off) is not False)


def _keywords(value: ast.expr | None) -> dict[str, ast.expr]:
    """The keywords of ``field(…)``."""
    if not isinstance(value, ast.Call):
        return {} if value is None else {"default": value}
    return {item.arg: item.value for item in value.keywords if item.arg is not None}


def _argument(node: ast.AnnAssign, body: list[ast.stmt], enums: Mapping[str, Mapping[str, str]]) -> Argument:
    keywords = _keywords(node.value)
    parts = [ast.unparse(part) for part in _parts(node.annotation)]
    choices: list[Any] = []
    for part in parts:
        choices += [True, False] if part == "bool" else enums.get(part, {}).values()
    metadata = keywords.get("metadata")
    about = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    text = next((_literal(value) for key, value in about if key is not None and _literal(key) == "help"), "")
    return Argument(
        name=ast.unparse(node.target),
        kind=" | ".join(dict.fromkeys("str" if part in enums else part for part in parts)),
        default=_default(keywords, body, enums),
        help=str(text or ""),
        choices=(*choices, None) if choices and "None" in parts else tuple(choices),
    )


def _parts(annotation: ast.expr) -> Iterator[ast.expr]:
    """The types of a union."""
    if isinstance(annotation, ast.BinOp):
        yield from _parts(annotation.left)
        yield from _parts(annotation.right)
    else:
        yield annotation


def _default(keywords: Mapping[str, ast.expr], body: list[ast.stmt], enums: Mapping[str, Mapping[str, str]]) -> str:
    factory, value = keywords.get("default_factory"), keywords.get("default")
    if factory is not None:
        text = ast.unparse(factory)
        return {"list": "[]", "dict": "{}"}.get(text, text.removeprefix("lambda: "))
    if isinstance(value, ast.Attribute):
        return repr(enums.get(ast.unparse(value.value), {}).get(value.attr, value.attr))
    if isinstance(value, ast.Name):  # a variable of the class body: its last value
        assigned = [item for node in body for item in ast.walk(node) if isinstance(item, ast.Assign)]
        values = [item.value for item in assigned if ast.unparse(item.targets[0]) == value.id]
        value = values[-1] if values else value
    literal = _literal(value) if value is not None else None
    return "" if value is None else ast.unparse(value) if literal is None else repr(literal)


def _literal(node: ast.expr) -> Any:
    """The value of a literal; None for another expression."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
