"""Help texts, made of the argument parsers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from nbpeft.magics.parse import LineParser, Subcommand


class HelpText:
    """A help text that keeps its layout when it is shown."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'<pre style="background:transparent">{escape(self.text)}</pre>'


def command_help(command: Subcommand, prog: str) -> str:
    """The help of one subcommand or cell magic."""
    return LineParser(command, prog).format_help().rstrip()


def main_help(cell: Subcommand, subcommands: Mapping[str, Subcommand], others: Iterable[Subcommand] = ()) -> str:
    """The help of ``%lora``: its cell form, its subcommands and the other cells, one line each."""
    width = max(map(len, subcommands))
    lines = [f"  %lora {name.ljust(width)}  {_first_sentence(item.summary)}" for name, item in subcommands.items()]
    cells = [f"  {f'%%{item.name}'.ljust(width + 6)}  {_first_sentence(item.summary)}" for item in others]
    return f"""{command_help(cell, "%%lora")}

line form:
  %lora {" " * width}  Show the adapted models and their adapters.
{chr(10).join(lines)}

other cells:
{chr(10).join(cells)}

Without --model a command uses the model that was adapted, loaded into, trained or switched last.
Where several models carry adapters, one that takes something away (merge, unload, delete, …) needs it.

%lora COMMAND --help describes one of them."""


def _first_sentence(summary: str) -> str:
    return summary.partition(". ")[0].rstrip(".") + "."
