"""The registry of ``%lora`` subcommands and cell magics: every file in ``subcommands/`` registers its own."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import Argument, AsMapping, Subcommand, argument, pair, positive, prompt_text, variable
from nbpeft.names import DEFAULT_ADAPTER, ROW_CHOICES, ROW_OPTIONS

Run = Callable[[argparse.Namespace, NotebookContext], object]

_subcommands: dict[str, Subcommand] = {}
_cells: dict[str, Subcommand] = {}

ON_MODEL = argument(
    "--model",
    "-m",
    metavar="MODEL",
    completes="model",
    reads=NotebookContext.chosen,
    help="the model; not needed if only one has adapters, or those that are named",
)
"""The option of subcommands that need an adapted model: required if there are several."""
MODEL = argument("target", metavar="MODEL", completes="model", help="variable with the model")
ADAPTER_NAME = argument(
    *("--name", "-n"),
    metavar="NAME",
    default=DEFAULT_ADAPTER,
    completes="adapter",
    help=f"name of the adapter (default: {DEFAULT_ADAPTER})",
)
ALLOW_MISSING = argument("--allow-missing", action="store_true", help="continue if a target matches no layer")
METHOD = argument(
    "--method",
    metavar="METHOD",
    completes="method",
    help="lora, ia3, …; determines the fields (default: that of the existing adapter, else lora)",
)
ADAPTER = argument("name", metavar="NAME", completes="adapter", help="the adapter")
NEW_NAME = argument("new", metavar="NEW", help="the new name")

TOKENIZER = argument(
    "--tokenizer",
    "-t",
    metavar="TOKENIZER",
    completes="variable",
    help="variable with the tokenizer (default: the notebook's only one)",
)
DATA = argument(
    "--data",
    "-d",
    required=True,
    metavar="DATA",
    completes="data",
    help="training rows: a variable or expression, a .jsonl, .json, .csv, .tsv or .parquet file, user/name:split, or a "
    "mixture of them: a*0.7 b*0.3",
)
MAX_LENGTH = argument(
    "--max-length", type=positive, metavar="N", help="maximum length of a row in tokens; longer rows are truncated"
)
_COLUMNS = ("prompt", "completion", "text", "messages", "conversations", "instruction", "input", "output", "system")
COLUMNS = argument(
    "--columns",
    nargs="+",
    type=pair,
    action=AsMapping,
    metavar="NAME=COLUMN",
    words=tuple(f"{name}=" for name in (*_COLUMNS, "tools", "input_ids", "labels")),
    help="names of the columns, e.g. prompt=question completion=answer; with instruction=question output=answer the "
    "chat template is applied",
)


SEPARATOR = argument(
    "--separator",
    metavar="CHARACTER",
    help=r"what separates the cells of a .csv or .tsv file, e.g. ';', '|' or '\t' (default: it is detected)",
)
SKIP_BAD = argument("--skip-bad", action="store_true", help="leave out rows that cannot be read, and say how many")
TEMPLATE = argument(
    "--template",
    dest="chat_template_kwargs",
    nargs="+",
    type=variable,
    action=AsMapping,
    metavar="NAME=VALUE",
    words=("enable_thinking=", "thinking=", "reasoning_effort="),
    help="variables for the chat template, e.g. enable_thinking=False; kept with the adapter, which is asked with them",
)


def _row_choice(name: str, words: str) -> Argument:
    """The option for one of ``ROW_CHOICES``."""
    values = ROW_CHOICES[name]
    return argument(f"--{name}", choices=values, words=values, help=f"{words} (default: {values[0]})")


LONG = _row_choice("long", "rows longer than --max-length: cut them, drop them, or split texts into several rows")
CHATS = (
    _row_choice(
        "learn",
        "turns of the assistant to learn: all, the last one, or the completion: all after the last message of the user",
    ),
    _row_choice("reasoning", "reasoning of the assistant: keep it, mask it (read, not learned) or drop it"),
    TEMPLATE,
    LONG,
)
"""Options of rows that are texts and conversations."""


def chats_of(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the options ``CHATS`` that are given."""
    values = {name: getattr(options, name, None) for name in ROW_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def answer_limit(usual: int | None, words: str) -> Argument:
    """The option ``--max-new-tokens``."""
    return argument("--max-new-tokens", type=positive, default=usual, metavar="N", help=words)


def separator_of(options: argparse.Namespace) -> str | None:
    r"""The character of ``--separator``, in which ``\t`` is a tab; None if it is not given."""
    return None if options.separator is None else prompt_text(options.separator)


def subcommand(
    name: str,
    summary: str,
    *arguments: Argument,
    fields: str = "",
    example: str = "",
    cell: bool = False,
    refused: Mapping[str, str] | None = None,
) -> Callable[[Run], Run]:
    """Register a function as a subcommand of ``%lora`` or as a cell magic.

    Args:
        name: the word after ``%lora``, or the cell magic.
        summary: one line for the help.
        *arguments: its arguments.
        fields: the kind of fields that ``name=value`` words and cell bodies set: ``config``, ``training``, ``qlora`` or
            none.
        example: shown in the help.
        cell: whether it is a cell magic.
        refused: name of an option or field of a similar command that it does not have -> why.

    Returns:
        A decorator that returns the function unchanged.
    """

    def decorate(run: Run) -> Run:
        command = Subcommand(name, summary, run, arguments, fields, example, refused or {})
        (_cells if cell else _subcommands)[name] = command
        return run

    return decorate


def refuse_fields(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Refuse fields that are set by an option of the line, so that nothing is given twice.

    Raises:
        CellError: one of them is set as a field.
    """
    for name in names:
        if name in options.fields:
            raise CellError(f"{name} is an option of the magic's line, not a field of the cell")


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a config, with the ``peft_type`` that ``--method`` names.

    Raises:
        CellError: the field ``peft_type`` names another method.
    """
    fields = dict(options.fields)
    if options.method is not None and fields.setdefault("peft_type", options.method) != options.method:
        raise CellError(f"--method {options.method} and peft_type = {fields['peft_type']!r} contradict each other")
    return fields


def session_command(name: str, summary: str, *arguments: Argument, method: str = "", example: str = "") -> None:
    """Register a subcommand that only passes its positional arguments and the model to a method of the session.

    Args:
        name: the word after ``%lora``.
        summary: one line for the help.
        *arguments: its arguments.
        method: the name of the method; by default that of the subcommand.
        example: shown in the help.
    """

    def run(options: argparse.Namespace, notebook: NotebookContext) -> Any:
        places: list[Any] = []
        named: dict[str, Any] = {}
        for item in arguments:
            value = getattr(options, item.dest)
            value = value if item.reads is None else item.reads(notebook, value)
            if item.positional:
                places.append(value)
            else:
                named[item.dest] = value
        return getattr(notebook.session, method or name)(*places, **named)

    subcommand(name, summary, *arguments, example=example)(run)


def registered() -> tuple[dict[str, Subcommand], dict[str, Subcommand]]:
    """All subcommands and all cell magics, by name, in the order of their files."""
    package = importlib.import_module("nbpeft.magics.subcommands")
    for item in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{item.name}")
    return dict(_subcommands), dict(_cells)
