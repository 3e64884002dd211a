"""The format of the rows that an adapter was trained on, so that prompts can use the same format.

It is an attribute of the adapter's config that copies of the config keep, and it is saved in the metadata of the tensor
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
    """The format of the rows that an adapter is trained on.

    Attributes:
        chat: whether the chat template was applied.
        system: the common system prompt of all rows; empty without one, None if the rows have different prompts.
    """

    chat: bool
    system: str | None = ""

    def to_metadata(self) -> dict[str, str]:
        """Returns entries for a file's metadata."""
        return {_CHAT: str(self.chat).lower(), **({} if self.system is None else {_SYSTEM: self.system})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PromptFormat | None:
        """Returns the format in a file's metadata; None if it is missing or invalid."""
        chat, system = metadata.get(_CHAT), metadata.get(_SYSTEM)
        if chat not in ("true", "false") or len(system or "") > _LONGEST:
            return None
        return cls(chat == "true", system)


def prompt_format(config: AdapterConfig) -> PromptFormat | None:
    """Returns the format of the rows that an adapter was trained on; None if it is unknown.

    Args:
        config: config of the adapter.
    """
    found: PromptFormat | None = vars(config).get(_ATTRIBUTE)
    return found


def set_prompt_format(config: AdapterConfig, form: PromptFormat | None) -> None:
    """Records the format of the rows that an adapter was trained on.

    Args:
        config: config of the adapter.
        form: the format; None if it is unknown.
    """
    vars(config)[_ATTRIBUTE] = form


def common_format(configs: Iterable[AdapterConfig]) -> PromptFormat | None:
    """Returns the common format of several adapters; None if it is unknown, or only some used a chat template.

    Args:
        configs: configs of the adapters; those with an unknown format are ignored.
    """
    found = {form for config in configs if (form := prompt_format(config)) is not None}
    chats, systems = {form.chat for form in found}, {form.system for form in found}
    return PromptFormat(chats.pop(), systems.pop() if len(systems) == 1 else None) if len(chats) == 1 else None
