"""Rewrites the messages of the session in the notation of cells.

The session names Python calls and arguments, ``session.use('sql')``, ``(name=…)`` and ``eval_data=0.1``. In a cell
these are ``%lora use sql``, ``(--name)`` and ``--eval-data 0.1``.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nbpeft.magics.parse import Subcommand
from nbpeft.magics.tokenize import quoted

_PHRASES = {
    "session.add(model, config)": "a cell that begins with %%lora MODEL",
    "session.train trains": "%%lora_train trains",
    "session.score(data=…)": "%lora score --data DATA",
    "session.merge(to=…)": "%lora merge --to DIR",
    "session.merge(calibrate=…)": "%lora merge --calibrate DATA",
    "with members={": "with the line members = {",
    "model.enable_adapter_layers()": "%lora use NAME",
    "session.result()": "%lora watch --wait",
    "halving=True": "--halving",
    "save_as_lora(DIR, model, rank=64)": "%lora convert NAME --r 64",
}
_ROW_OPTIONS = {"data": "--data", "eval_data": "--eval-data"}
_ROWS = re.compile(r"(?<![\w.'\"-])((?:eval_)?data)=\{([^{}…]+: …(?:, [^{}…]+: …)*)\}")
_CALL = re.compile(r"session\.(\w+)\((.*?)\)")
_UNFREEZE = re.compile(r"model\.set_requires_grad\((.*?)\)")
_LIST = re.compile(r"\[('[^']*'(?:, '[^']*')*)\]")
_COLUMNS = re.compile(r"columns=(\{['\"][^{}]*\})")
_NEVER = "(?!)"
_GIVEN = r"(?<![\w=])'[^']*'|(?<![\w=])\"[^\"]*\"|%lora \w+ \w+|(?<![\w-])--[\w-]+ \w+"
"""What a user gave, in quotes or in a command: it may contain, or be called like, the names of options."""
_NOT_AFTER = r"(?<![\w.'\"/\\?&-])"
"""What precedes a name that is part of a path or of another word."""
_VALUE = r"(?P<value>…|\.\.\.|'[^']*'|True\b|False\b|None\b|-?\d[\w.]*)"
_ARGUMENT = re.compile(r"(?<!\w)\((\w+)=…\)")
_MODEL = re.compile(r"\bmodel='([^']+)'")


def _as_command(call: re.Match[str]) -> str:
    """``session.freeze('sql', off=True, model='a')`` as ``%lora freeze sql --off --model a``."""
    words = _LIST.sub(r"\1", call[2]).replace(", off=True", " --off").replace(", model=", " --model ")
    return f"%lora {call[1]} {words.replace(', ', ' ').replace(chr(39), '')}".rstrip()


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


def _with_rows(argument: re.Match[str]) -> str:
    """``data={'a': …, 'b': …}`` as ``--data a=DATA b=DATA``."""
    names = [part.rpartition(": ")[0].strip("'") for part in argument[2].split(", ")]
    return " ".join([_ROW_OPTIONS[argument[1]], *(f"{name}=DATA" for name in names)])


def option_names(command: Subcommand, others: Iterable[Subcommand]) -> dict[str, str]:
    """Return the options of a command by the names of the session's arguments: ``eval_data`` -> ``--eval-data``.

    Those of other commands are included, except for a command with fields: there, a name may be that of a field.
    """
    known = {item.dest: item.flags[0] for other in others for item in other.arguments if not item.positional}
    own = {item.dest: item.flags[0] for item in command.arguments if not item.positional}
    return own if command.fields else {**known, **own}


def _with_options(said: str, names: Mapping[str, str]) -> str:
    """Replace ``eval_data=0.1`` by ``--eval-data 0.1``, and a name alone where it can only be meant so."""

    def spelled(found: re.Match[str]) -> str:
        name, value = found["given"], found["value"]
        if name is None:
            return names.get(found["alone"] or found["first"], found[0])
        if value == "False" and names[name].startswith("--no-"):
            return names[name]
        if value in ("…", "...", "True"):
            return names[name]
        return f"{names[name]} {quoted(value.strip(chr(39)))}"

    words = "|".join(sorted(names, key=len, reverse=True)) or _NEVER
    alone = "|".join(name for name in names if "_" in name) or _NEVER
    begins = "|".join(name for name in names if name != "model") or _NEVER  # "model needs …": a variable's name
    options = (
        rf"{_NOT_AFTER}(?P<given>{words})={_VALUE}",
        rf"^(?P<first>{begins})(?= (?:has (?:no effect|rows for)|needs|must|is for) )",
        rf"{_NOT_AFTER}(?<!=)(?P<alone>{alone})(?![\w'\"=(/\\-]|\.\w)",
    )
    return re.sub("|".join((_GIVEN, *options)), spelled, said)


def in_cell_spelling(said: Any, names: Mapping[str, str] | None = None) -> Any:
    """Return a message, or a result with its notes, in the notation of cells.

    Args:
        said: the message or the result.
        names: argument of the session -> option of the command, as ``option_names`` returns them.
    """
    if isinstance(said, tuple):
        return tuple(in_cell_spelling(part, names) for part in said)
    if isinstance(said, str):
        for phrase, cell in _PHRASES.items():
            said = said.replace(phrase, cell)
        said = _UNFREEZE.sub(r"session.freeze(\1, off=True)", said)
        said = _CALL.sub(_as_command, said)
        said = _ROWS.sub(_with_rows, _COLUMNS.sub(_as_option, said))
        said = _MODEL.sub(_with_model, said)
        return _ARGUMENT.sub(_with_option, _with_options(said, names) if names else said)
    if dataclasses.is_dataclass(said) and not isinstance(said, type):
        parts = {name: getattr(said, name) for name in ("line", "notes", "added") if hasattr(said, name)}
        changed = {name: new for name, part in parts.items() if (new := in_cell_spelling(part, names)) != part}
        return dataclasses.replace(said, **changed) if changed else said
    return said
