"""Connects completion to IPython: as a v2 matcher, or with the old hook in versions without matchers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbpeft.magics.cells import appended
from nbpeft.magics.complete import (
    CompletionSources,
    Suggestions,
    chosen_method,
    chosen_model,
    complete_arguments,
    complete_body,
    complete_line,
    split,
)
from nbpeft.magics.parse import Subcommand

IDENTIFIER = "nbpeft.magics"


class Completion:
    """Suggestions for all magics of the extension.

    Args:
        subcommands: subcommands of ``%lora``.
        cells: cell magic -> the command whose arguments its line takes.
        sources: the sources of names.
    """

    def __init__(
        self, subcommands: Mapping[str, Subcommand], cells: Mapping[str, Subcommand], sources: CompletionSources
    ) -> None:
        self.subcommands = subcommands
        self.cells = cells
        self.sources = sources

    @property
    def keys(self) -> tuple[str, ...]:
        """The words with which a line of these magics begins, for the old hook."""
        return ("%lora", *(f"%{name}" for name in self.cells if name != "lora"), *(f"%%{name}" for name in self.cells))

    def suggest(self, text: str, line: int, column: int) -> Suggestions | None:
        """Suggestions at a position in a cell.

        Args:
            text: the whole cell.
            line: 0-based line of the cursor.
            column: 0-based column of the cursor.

        Returns:
            None if the position does not belong to these magics.
        """
        lines = text.split("\n")
        head = lines[0].lstrip() if lines else ""
        if head.startswith("%%"):
            name, _, rest = head[2:].partition(" ")
            command = self.cells.get(name)
            if command is None:
                return None
            if line == 0:
                before = lines[0][:column].lstrip()[2 + len(name) :]
                return self._arguments(command, before) if before[:1].isspace() else None
            names = self.sources.fields.get(command.fields)
            if names is None:
                return None
            method, (words, fragment) = chosen_method(text), split(rest)
            model = chosen_model(words) or fragment
            return complete_body(
                "\n".join(lines[1:]),
                line - 1,
                column,
                lambda: names(method),
                lambda field: self.sources.values(command.fields, field, method, model),
            )
        before = lines[line][:column].lstrip() if line < len(lines) else ""
        name, space, rest = before[1:].partition(" ")
        if not before.startswith("%") or not space:
            return None
        if name == "lora":
            return complete_line(rest, self.subcommands, self.sources)
        return self._arguments(self.cells[name], f" {rest}") if name in self.cells else None

    def _arguments(self, command: Subcommand, before: str) -> Suggestions:
        words, fragment = split(before)
        return complete_arguments(command, words, fragment, self.sources)


def install(shell: Any, completion: Completion) -> Callable[[], None]:
    """Register the completion with a shell; return a function that removes it."""
    matchers = getattr(shell.Completer, "custom_matchers", None)
    matcher = _matcher(completion) if matchers is not None else None
    if matchers is None or matcher is None:
        return _install_hook(shell, completion)
    return appended(matchers, matcher)


def _matcher(completion: Completion) -> Any:
    try:
        from IPython.core.completer import SimpleCompletion, context_matcher
    except ImportError:  # IPython before 8.6
        return None

    @context_matcher(identifier=IDENTIFIER)
    def nbpeft_matcher(context: Any) -> Any:
        suggestions = completion.suggest(context.full_text, context.cursor_line, context.cursor_position)
        if suggestions is None or not (suggestions.words or suggestions.closed):
            return {"completions": [], "suppress": False}  # a new dict each time: IPython modifies it
        return {
            "completions": [SimpleCompletion(text=word, type="magic") for word in suggestions.words],
            "suppress": suggestions.closed,
            "ordered": True,
            "matched_fragment": suggestions.fragment,
        }

    return nbpeft_matcher


def _install_hook(shell: Any, completion: Completion) -> Callable[[], None]:
    def complete(_shell: Any, event: Any) -> list[str]:
        text = event.text_until_cursor
        suggestions = completion.suggest(text, 0, len(text))
        return [] if suggestions is None else list(suggestions.words)

    for key in completion.keys:
        shell.set_hook("complete_command", complete, str_key=key)

    def remove() -> None:
        dispatcher = shell.strdispatchers.get("complete_command")
        for key in completion.keys:
            if dispatcher is not None:
                dispatcher.strs.pop(key, None)

    return remove
