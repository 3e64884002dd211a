"""Help texts, made of the argument parsers."""

from __future__ import annotations

from collections.abc import Mapping
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


def main_help(cell: Verb, verbs: Mapping[str, Verb]) -> str:
    """The help of ``%lora``: its cell form and its verbs."""
    width = max(map(len, verbs))
    lines = [f"  %lora {name.ljust(width)}  {item.summary}" for name, item in verbs.items()]
    return "\n".join(
        [
            verb_help(cell, "%%lora"),
            "",
            "line form:",
            f"  %lora {' ' * width}  Show the adapted models and their adapters.",
            *lines,
            "",
            "%lora VERB --help tells more about one of them.",
        ]
    )
