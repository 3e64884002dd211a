"""Help texts, examples first, generated from the declarations of the commands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbpeft.display.blocks import Block, Card, Table, Text, card, dim, line
from nbpeft.display.shown import Shown
from nbpeft.errors import CheckpointNotFoundError
from nbpeft.magics.parse import Argument, Subcommand

FOR_AGENTS = "--agent"
_AGENTS = "AGENTS.md"
_CELLS = "Set up and train"
GROUPS: dict[str, tuple[str, ...]] = {
    "Which adapters are active": ("use", "scale", "freeze"),
    "Adapters of a model": ("add", "load", "save", "push", "ship", "rename", "copy", "delete", "reset", "undo"),
    "Base weights": ("merge", "unmerge", "unload"),
    "Plan and look at data": ("methods", "plan", "data"),
    "See and compare": ("ask", "compare", "score", "panel", "inspect", "memory"),
    "Several adapters": ("combine", "convert", "swap"),
    "Trainings": ("watch", "pause", "resume", "stop", "clone", "runs", "export"),
    "When something fails": ("doctor",),
}
_WIDTH = 88
"""The width of plain text, in characters: JupyterLab's tooltip shows about 90."""
_WHICH_MODEL = "If several models have adapters, --model names the one to use."
_FIELDS = {
    "config": "a field of the config; in a cell one per line, name = value",
    "training": "a field of TrainingArguments; in a cell one per line, name = value. The default learning_rate follows "
    "from method, model and objective, and the card says which it is: for LoRA 1.3e-3 at a width of 576 and 2.9e-4 at "
    "4,096, for preferences and rewards a tenth of that",
    "plan": "a field of the config, the quantization or the training, as in their cells",
    "qlora": "a field of the quantization or of the config; in a cell one per line, name = value",
}

Rows = tuple[tuple[str, str], ...]


class HelpText(Shown):
    """A help text: sections of rows, each with an example or an argument and its description."""

    def __init__(self, title: str, sections: Mapping[str, Rows], *, lead: str = "", ending: Iterable[str] = ()) -> None:
        self._title = title
        self._lead = lead
        self._sections = {name: rows for name, rows in sections.items() if rows}
        self._ending = tuple(ending)

    def __str__(self) -> str:
        explained = (left for rows in self._sections.values() for left, right in rows if right)
        width = min(max((len(part) for left in explained for part in left.split("\n")), default=0), 42)
        parts = [self._title, *([self._lead] if self._lead else [])]
        for name, rows in self._sections.items():
            parts += ["", name, *(text for left, right in rows for text in _row_text(left, right, width))]
        return "\n".join([*parts, *(["", *self._ending] if self._ending else [])])

    def view(self) -> Card:
        """A card with one table per section."""
        blocks: list[Block] = []
        for name, rows in self._sections.items():
            cells = tuple((Text(left, "code", wrap="as is"), dim(right)) for left, right in rows)
            blocks.append(Table((name, ""), cells, first=46))
        return card(self._title, line(self._lead), *blocks, *(line(dim(text)) for text in self._ending))


@dataclass(frozen=True, repr=False)
class AgentGuide(Shown):
    """The page for programs that drive a notebook.

    Attributes:
        page: the page, in Markdown.
    """

    page: str

    def __str__(self) -> str:
        return self.page

    def view(self) -> Card:
        """Shows the page as it is written."""
        return card(_AGENTS, line(Text(self.page, "code", wrap="as is")))


def agent_guide() -> AgentGuide:
    """Returns the page for programs that drive a notebook; the wheel has a copy of the page in the guide.

    Raises:
        CheckpointNotFoundError: the installed package lacks it.
    """
    package = Path(__file__).parents[1]
    for folder in (package, package.parent / "notebooks" / "guide"):
        if (folder / _AGENTS).is_file():
            return AgentGuide((folder / _AGENTS).read_text(encoding="utf-8").rstrip())
    raise CheckpointNotFoundError(f"{_AGENTS} is neither in the installed package nor in the checkout it runs from")


def _row_text(left: str, right: str, width: int) -> Iterator[str]:
    first, *others = left.split("\n")
    words = textwrap.wrap(right, max(_WIDTH - width - 4, 30)) if right else []
    if not words or others or len(first) > width:
        yield from (f"  {text}" for text in (first, *others))
    else:
        yield f"  {first:{width}}  {words.pop(0)}"
    yield from (f"  {'':{width}}  {text}" for text in words)


def command_help(command: Subcommand, prog: str) -> HelpText:
    """The help of one subcommand or cell magic.

    Args:
        command: the command.
        prog: how its line begins, e.g. ``%lora use``.
    """
    example = command.example or " ".join((prog, *(_usage(item) for item in command.arguments if item.positional)))
    fields: Rows = (("name=value", _FIELDS.get(command.fields, "")),) if command.fields else ()
    arguments = tuple((_usage(item), _help(item)) for item in command.arguments if item.positional)
    options = tuple((_usage(item), _help(item)) for item in command.arguments if not item.positional)
    sections = {"Example": ((example, ""),), "Arguments": (*arguments, *fields), "Options": options}
    return HelpText(prog, sections, lead=command.summary)


def argument_help(item: Argument) -> str:
    """One argument and its description."""
    return f"{_usage(item)}\n{_help(item)}"


def main_help(cells: Mapping[str, Subcommand], subcommands: Mapping[str, Subcommand]) -> HelpText:
    """The help of ``%lora``: every command in its group, with an example and a summary."""
    sections = {_CELLS: tuple(_overview(command, f"%%{name}") for name, command in cells.items())}
    status = ("%lora", "Show the adapted models and their adapters.")
    for title, names in GROUPS.items():
        rows = tuple(_overview(subcommands[name], f"%lora {name}") for name in names if name in subcommands)
        sections[title] = (status, *rows) if title == "See and compare" else rows
    ending = (
        "%lora help COMMAND describes one command, e.g. %lora help plan or %lora help lora_train.",
        f"%lora help {FOR_AGENTS} is a page for programs that drive a notebook.",
        _WHICH_MODEL,
    )
    return HelpText("nbpeft · adapters in a notebook", sections, ending=ending)


def _overview(command: Subcommand, prog: str) -> tuple[str, str]:
    return command.example or prog, command.summary.partition(". ")[0].rstrip(".") + "."


def _usage(item: Argument) -> str:
    """How an argument is written: ``--batch-size N``, ``MODEL``."""
    choices = item.options.get("choices")
    usual = f"{{{','.join(choices)}}}" if choices else item.flags[0].lstrip("-")
    given = item.options.get("metavar") or usual
    name = given if isinstance(given, str) else " ".join(given)
    if item.positional:
        return f"{name} …" if item.many else name
    flags = ", ".join(item.flags)
    return f"{flags} {name}{' …' if item.many else ''}" if item.takes_value else flags


def _help(item: Argument) -> str:
    text = str(item.options.get("help", ""))
    return f"{text} (required)" if item.options.get("required") else text
