"""How the rows of a training are written: with the chat template or without, with which system prompts.

And whether something separates a prompt from its completion.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from nbpeft._util.conversations import system_text
from nbpeft.checkpoint import PromptFormat
from nbpeft.checkpoint.prompt_format import as_text
from nbpeft.training.data.encoding import CodedRow
from nbpeft.training.data.forms import Chat, Compared, Example, Pair
from nbpeft.training.data.options import RowOptions

_SENTENCE_ENDS, _QUOTES = ".,;:?!)…\"'", "\"'"
_RUN_ON = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_SHOWN = 12
"""The number of characters that a message shows on each side of a joint."""


class SeenFormats:
    """The forms of the rows read so far.

    Args:
        options: how the rows are read.
        for_template: the columns with which the chat template is applied to the rows; empty if it cannot be.
        limit: the greatest number of tokens of a row.
    """

    def __init__(
        self,
        options: RowOptions | None = None,
        for_template: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> None:
        self._for_template = dict(for_template or {})
        options = options or RowOptions()
        self._template = as_text(options.chat_template_kwargs or {})
        self._learns_reasoning = options.reasoning == "keep"
        self._lengths = ("cut", None) if options.long == "cut" else (options.long, limit)
        self._systems: dict[str | None, int] = {}
        self._joint, self._joined = "", 0
        self._alike: list[int] = []

    def add(self, row: CodedRow) -> None:
        """Counts one more row."""
        self._systems[row.system] = self._systems.get(row.system, 0) + 1
        self._joint = self._joint or row.joint
        self._joined += bool(row.joint)
        if row.rejected is not None and row.rejected.whole.input_ids == row.whole.input_ids:
            self._alike.append(row.number)

    @property
    def format(self) -> PromptFormat | None:
        """The common form; None before the first row. With rows of both kinds, that of the first row."""
        if not self._systems:
            return None
        if next(iter(self._systems)) is None:
            return PromptFormat(False, "", "", (), True, *self._lengths)
        systems = [system for system in self._systems if system is not None]
        system = systems[0] if len(systems) == 1 else None
        return PromptFormat(True, system, self._template, (), self._learns_reasoning, *self._lengths)

    def lines(self) -> tuple[str, ...]:
        """Lines about joints of prompts and completions, about system prompts, and about pairs that are no choice."""
        return (*self._about_joints(), *self._about_systems(), *self._about_pairs())

    def _about_joints(self) -> tuple[str, ...]:
        if not self._joined:
            return ()
        total = sum(self._systems.values())
        some = f" in {self._joined:,} of {total:,} rows" if self._joined < total else ""
        way = "begin each completion with a space, or end each prompt with a line break"
        if self._for_template:
            way = f"columns={self._for_template} applies the chat template, which separates them"
        return (f"nothing separates prompt and completion{some} ({self._joint!r}): {way}",)

    def _about_systems(self) -> tuple[str, ...]:
        systems = [system for system in self._systems if system]
        form, total = self.format, sum(count for system, count in self._systems.items() if system is not None)
        if form is None or form.system is not None:
            return ()
        found = f"the rows have {len(systems)} different system prompts"
        if len(systems) == 1:
            found = f"only {total - self._systems['']:,} of {total:,} rows have a system prompt"
        return (f"{found}: the adapter has no default system prompt",)

    def _about_pairs(self) -> tuple[str, ...]:
        if not self._alike:
            return ()
        count, total = len(self._alike), sum(self._systems.values())
        where = (
            f"row {self._alike[0]}" if count == 1 else f"{count:,} of {total:,} rows, the first is row {self._alike[0]}"
        )
        return (f"chosen and rejected are the same in {where}: nothing is preferred there",)


def system_of(example: Example) -> str | None:
    """The system prompt of a row, empty if it has none; None for a row without the chat template.

    Args:
        example: the row.
    """
    if not isinstance(example, Chat):
        return None
    return system_text(example.messages[0]) if example.messages else ""


def _runs_on(character: str) -> bool:
    """Whether a character is of a script that does not separate words with spaces."""
    script = unicodedata.name(character, "").partition(" ")[0]
    return script in _RUN_ON or unicodedata.east_asian_width(character) in "WFH"


def joint_of(example: Example) -> str:
    """The text around the joint of a prompt and its completion, if they run into each other; else empty.

    They do if both are words or sentences of a script that separates words, without white space in between. Prompts
    that end with a sign of their own, such as ``=``, ``->`` or ``[/INST]``, do not.

    Args:
        example: the row.
    """
    example = example.chosen if isinstance(example, Compared) else example
    if not isinstance(example, Pair) or not example.prompt or not example.completion:
        return ""
    before, after = example.prompt[-1], example.completion[0]
    if any(map(_runs_on, (before, after))):
        return ""
    ends = before.isalnum() or before in _SENTENCE_ENDS
    begins = after.isalnum() or after in _QUOTES or unicodedata.category(after) in ("Ps", "Pi")
    if not (ends and begins):
        return ""
    left, right = example.prompt[-_SHOWN:], example.completion[:_SHOWN]
    return ("…" if left != example.prompt else "") + left + right + ("…" if right != example.completion else "")
