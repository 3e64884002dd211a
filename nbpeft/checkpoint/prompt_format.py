"""The form of the rows that an adapter was trained on: kept with it, so that it is asked in the same form.

The form is an attribute of the adapter's config, which copies carry along, and is saved in the metadata of the tensor
file, which PEFT does not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbpeft.engine.contract.adapter import AdapterConfig

_ATTRIBUTE = "_prompt_format"
_CHAT, _SYSTEM = "nbpeft.prompt.chat", "nbpeft.prompt.system"
_LONGEST = 100_000
"""Most characters of a system prompt that is read from a file."""


@dataclass(frozen=True)
class PromptFormat:
    """The form of the rows of a training.

    Attributes:
        chat: whether the chat template was applied.
        system: the system prompt of all rows, empty if they have none; None if they have different ones.
    """

    chat: bool
    system: str | None = ""

    def to_metadata(self) -> dict[str, str]:
        """Returns entries for a file's metadata."""
        return {_CHAT: str(self.chat).lower(), **({} if self.system is None else {_SYSTEM: self.system})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PromptFormat | None:
        """Returns the form in a file's metadata; None if it is missing or invalid."""
        chat, system = metadata.get(_CHAT), metadata.get(_SYSTEM)
        if chat not in ("true", "false") or len(system or "") > _LONGEST:
            return None
        return cls(chat == "true", system)


def prompt_format(config: AdapterConfig) -> PromptFormat | None:
    """Returns the form of the rows that an adapter was trained on; None if it is unknown.

    Args:
        config: config of the adapter.
    """
    found: PromptFormat | None = vars(config).get(_ATTRIBUTE)
    return found


def set_prompt_format(config: AdapterConfig, form: PromptFormat | None) -> None:
    """Records the form of the rows that an adapter was trained on.

    Args:
        config: config of the adapter.
        form: the form; None if it is unknown.
    """
    vars(config)[_ATTRIBUTE] = form


def common_format(configs: Iterable[AdapterConfig]) -> PromptFormat | None:
    """Returns the common form of the rows of several adapters; None if it is unknown, or only some used a template.

    Args:
        configs: configs of the adapters; those whose form is unknown do not count.
    """
    found = {form for config in configs if (form := prompt_format(config)) is not None}
    chats, systems = {form.chat for form in found}, {form.system for form in found}
    return PromptFormat(chats.pop(), systems.pop() if len(systems) == 1 else None) if len(chats) == 1 else None
