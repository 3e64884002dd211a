"""Rewrites the messages of the session in the notation of cells.

The session names Python calls and arguments, ``session.use('sql')`` and ``(name=…)``. In a cell these are
``%lora use sql`` and ``(--name)``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_PHRASES = {
    "session.add(model, config)": "a cell that begins with %%lora MODEL",
    "session.merge(to=…)": "%lora merge --to DIR",
    "session.merge(calibrate=…)": "%lora merge --calibrate ROWS",
    "model.enable_adapter_layers()": "%lora on",
    "save_as_lora(DIR, model, rank=64)": "%lora convert NAME --rank 64",
}
_CALL = re.compile(r"session\.(\w+)\(['\"]?(.*?)['\"]?\)")
_COLUMNS = re.compile(r"columns=\{('\w+': '.*?')\}")
_ARGUMENT = re.compile(r"(?<!\w)\((\w+)=…\)")
_MODEL = re.compile(r"\bmodel='([^']+)'")
_PAIR = r"'(\w+)': '(.*?)'(?:, )?(?=(')?)"


def _as_option(pair: re.Match[str]) -> str:
    """``'prompt': 'my question', `` as ``prompt="my question" ``."""
    column = f'"{pair[2]}"' if " " in pair[2] else pair[2]
    return f"{pair[1]}={column}{' ' if pair[3] else ''}"


def _with_model(name: re.Match[str]) -> str:
    """``model='a'`` as ``--model a``; a name with spaces in quotes."""
    return f'--model "{name[1]}"' if " " in name[1] else f"--model {name[1]}"


def _with_option(argument: re.Match[str]) -> str:
    """``(max_length=…)`` as ``(--max-length)``."""
    return f"(--{argument[1].replace('_', '-')})"


def in_cell_spelling(said: Any) -> Any:
    """Return a message, or a result with its notes, in the notation of cells."""
    if isinstance(said, tuple):
        return tuple(map(in_cell_spelling, said))
    if isinstance(said, str):
        for phrase, cell in _PHRASES.items():
            said = said.replace(phrase, cell)
        said = _CALL.sub(lambda call: f"%lora {call[1]} {call[2]}".rstrip(), said)
        said = _COLUMNS.sub(lambda found: f"--columns {re.sub(_PAIR, _as_option, found[1])}", said)
        return _ARGUMENT.sub(_with_option, _MODEL.sub(_with_model, said))
    if dataclasses.is_dataclass(said) and not isinstance(said, type):
        parts = {name: getattr(said, name) for name in ("line", "notes", "added") if hasattr(said, name)}
        changed = {name: new for name, part in parts.items() if (new := in_cell_spelling(part)) != part}
        return dataclasses.replace(said, **changed) if changed else said
    return said
