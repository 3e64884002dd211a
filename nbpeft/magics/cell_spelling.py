"""Rewrites the messages of the session in the notation of cells.

The session names Python calls and arguments, ``session.use('sql')`` and ``(name=…)``. In a cell these are
``%lora use sql`` and ``(--name)``.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from nbpeft.magics.tokenize import quoted

_PHRASES = {
    "session.add(model, config)": "a cell that begins with %%lora MODEL",
    "session.merge(to=…)": "%lora merge --to DIR",
    "session.merge(calibrate=…)": "%lora merge --calibrate ROWS",
    "with members={": "with the line members = {",
    "model.enable_adapter_layers()": "%lora on",
    "save_as_lora(DIR, model, rank=64)": "%lora convert NAME --rank 64",
}
_OPTIONS = {
    "data": "--data",
    "eval_data": "--eval",
    "eval_by": "--eval-by",
    "adapter": "--adapter",
    "patience": "--patience",
    "sample": "--sample",
    "score": "--score",
    "stop": "--stop",
}
"""Argument of a training -> the option of a cell."""
_VALUE = re.compile(rf"(?<![\w.'\"-])({'|'.join(_OPTIONS)})=('[^']*'|[\d.]*\d|…)")
_ROWS = re.compile(r"(?<![\w.'\"-])((?:eval_)?data)=\{([^{}…]+: …(?:, [^{}…]+: …)*)\}")
_CALL = re.compile(r"session\.(\w+)\(['\"]?(.*?)['\"]?\)")
_COLUMNS = re.compile(r"columns=(\{['\"][^{}]*\})")
_ARGUMENT = re.compile(r"(?<!\w)\((\w+)=…\)")
_MODEL = re.compile(r"\bmodel='([^']+)'")


def _as_option(columns: re.Match[str]) -> str:
    """``columns={'prompt': 'my question'}`` as ``--columns prompt="my question"``."""
    try:
        pairs: dict[str, str] = ast.literal_eval(columns[1])
    except (SyntaxError, ValueError):
        return columns[0]
    return " ".join(["--columns", *(f"{name}={quoted(column)}" for name, column in pairs.items())])


def _with_model(name: re.Match[str]) -> str:
    """``model='a'`` as ``--model a``; a name with spaces in quotes."""
    return f"--model {quoted(name[1])}"


def _with_option(argument: re.Match[str]) -> str:
    """``(max_length=…)`` as ``(--max-length)``."""
    return f"(--{argument[1].replace('_', '-')})"


def _with_value(argument: re.Match[str]) -> str:
    """``eval_data=0.1`` as ``--eval 0.1``."""
    return f"{_OPTIONS[argument[1]]} {argument[2].strip(chr(39))}"


def _with_rows(argument: re.Match[str]) -> str:
    """``data={'a': …, 'b': …}`` as ``--data a=ROWS b=ROWS``."""
    names = [part.rpartition(": ")[0].strip("'") for part in argument[2].split(", ")]
    return " ".join([_OPTIONS[argument[1]], *(f"{name}=ROWS" for name in names)])


def in_cell_spelling(said: Any) -> Any:
    """Return a message, or a result with its notes, in the notation of cells."""
    if isinstance(said, tuple):
        return tuple(map(in_cell_spelling, said))
    if isinstance(said, str):
        for phrase, cell in _PHRASES.items():
            said = said.replace(phrase, cell)
        said = _CALL.sub(lambda call: f"%lora {call[1]} {call[2]}".rstrip(), said)
        said = _VALUE.sub(_with_value, _ROWS.sub(_with_rows, _COLUMNS.sub(_as_option, said)))
        return _ARGUMENT.sub(_with_option, _MODEL.sub(_with_model, said))
    if dataclasses.is_dataclass(said) and not isinstance(said, type):
        parts = {name: getattr(said, name) for name in ("line", "notes", "added") if hasattr(said, name)}
        changed = {name: new for name, part in parts.items() if (new := in_cell_spelling(part)) != part}
        return dataclasses.replace(said, **changed) if changed else said
    return said
