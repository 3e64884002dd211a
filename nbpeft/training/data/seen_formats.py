"""How the rows of a training are written: with the chat template or without, and with which system prompts."""

from __future__ import annotations

from nbpeft._util.conversations import system_text
from nbpeft.checkpoint import PromptFormat
from nbpeft.checkpoint.prompt_format import as_text
from nbpeft.training.data.forms import Chat, Example
from nbpeft.training.data.options import RowOptions


class SeenFormats:
    """The forms of the rows read so far.

    Args:
        options: how the rows are read.
    """

    def __init__(self, options: RowOptions | None = None) -> None:
        options = options or RowOptions()
        self._template = as_text(options.chat_template_kwargs or {})
        self._learns_reasoning = options.reasoning == "keep"
        self._systems: dict[str | None, int] = {}

    def add(self, system: str | None) -> None:
        """Counts one more row.

        Args:
            system: its system prompt, empty if it has none; None for a row without the chat template.
        """
        self._systems[system] = self._systems.get(system, 0) + 1

    @property
    def format(self) -> PromptFormat | None:
        """The common form; None before the first row. With rows of both kinds, that of the first row."""
        if not self._systems:
            return None
        if next(iter(self._systems)) is None:
            return PromptFormat(chat=False)
        systems = [system for system in self._systems if system is not None]
        system = systems[0] if len(systems) == 1 else None
        return PromptFormat(True, system, self._template, learns_reasoning=self._learns_reasoning)

    def lines(self) -> tuple[str, ...]:
        """A line about rows with different system prompts; none if they agree."""
        systems = [system for system in self._systems if system]
        form, total = self.format, sum(count for system, count in self._systems.items() if system is not None)
        if form is None or form.system is not None:
            return ()
        found = f"the rows have {len(systems)} different system prompts"
        if len(systems) == 1:
            found = f"only {total - self._systems['']:,} of {total:,} rows have a system prompt"
        return (f"{found}: the adapter has no default system prompt",)


def system_of(example: Example) -> str | None:
    """The system prompt of a row, empty if it has none; None for a row without the chat template.

    Args:
        example: the row.
    """
    if not isinstance(example, Chat):
        return None
    return system_text(example.messages[0]) if example.messages else ""
