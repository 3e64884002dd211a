"""Help texts, made of the argument parsers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from nbpeft.magics.parse import Verb, parser_of


class HelpText:
    """A help text that shows itself as it is laid out."""

    def __init__(self, text: str | None) -> None:
        self.text = text or ""

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'<pre style="background:transparent">{escape(self.text)}</pre>'


def verb_help(verb: Verb, prog: str) -> str:
    """The help of one verb or cell magic."""
    return parser_of(verb, prog).format_help().rstrip()


def main_help(cell: Verb, verbs: Mapping[str, Verb], others: Iterable[Verb] = ()) -> str:
    """The help of ``%lora``: its cell form, its verbs and the other cells, one line each."""
    width = max(map(len, verbs))
    lines = [f"  %lora {name.ljust(width)}  {_first_sentence(item.summary)}" for name, item in verbs.items()]
    cells = [f"  {f'%%{item.name}'.ljust(width + 6)}  {_first_sentence(item.summary)}" for item in others]
    return "\n".join(
        [
            verb_help(cell, "%%lora"),
            "",
            "line form:",
            f"  %lora {' ' * width}  Show the adapted models and their adapters.",
            *lines,
            "",
            "other cells:",
            *cells,
            "",
            "Without --model a command acts on the model that was adapted, loaded into, trained or switched last.",
            "Where several models carry adapters, one that takes something away (merge, unload, delete, …) needs it.",
            "",
            "%lora VERB --help tells more about one of them.",
        ]
    )


def _first_sentence(summary: str) -> str:
    return summary.partition(". ")[0].rstrip(".") + "."
