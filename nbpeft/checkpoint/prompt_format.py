"""The format of the rows that an adapter was trained on, so that prompts can use the same format.

It is an attribute of the adapter's config that copies of the config keep, and it is saved in the metadata of the tensor
file, which PEFT does not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig

_ATTRIBUTE = "_prompt_format"
_CHAT, _SYSTEM, _TEMPLATE = "nbpeft.prompt.chat", "nbpeft.prompt.system", "nbpeft.prompt.template"
_LONGEST = 100_000
"""Most characters of a system prompt that is read from a file."""
NOT_FOR_TEMPLATES = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of ``apply_chat_template`` that are not variables of the template, or depend on the messages."""


@dataclass(frozen=True)
class PromptFormat:
    """The format of the rows that an adapter is trained on.

    Attributes:
        chat: whether the chat template was applied.
        system: the common system prompt of all rows; empty without one, None if the rows have different prompts.
        template: variables passed to the chat template, as JSON; empty if there are none.
    """

    chat: bool
    system: str | None = ""
    template: str = ""

    @property
    def variables(self) -> dict[str, Any]:
        """The variables passed to the chat template."""
        found: dict[str, Any] = json.loads(self.template or "{}")
        return found

    def to_metadata(self) -> dict[str, str]:
        """Returns entries for a file's metadata."""
        found = {_CHAT: str(self.chat).lower(), _TEMPLATE: self.template}
        if self.system is not None:
            found[_SYSTEM] = self.system
        return {name: value for name, value in found.items() if value or name == _SYSTEM}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PromptFormat | None:
        """Returns the format in a file's metadata; None if it is missing or invalid."""
        chat, system = metadata.get(_CHAT), metadata.get(_SYSTEM)
        if chat not in ("true", "false") or len(system or "") > _LONGEST:
            return None
        return cls(chat == "true", system, _checked(metadata.get(_TEMPLATE, "")))


def prompt_format(config: AdapterConfig) -> PromptFormat | None:
    """Returns the format of the rows that an adapter was trained on; None if it is unknown."""
    found: PromptFormat | None = vars(config).get(_ATTRIBUTE)
    return found


def set_prompt_format(config: AdapterConfig, form: PromptFormat | None) -> None:
    """Records the format of the rows that an adapter was trained on.

    Args:
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
    templates = {form.template for form in found}
    if len(chats) != 1:
        return None
    system, template = (some.pop() if len(some) == 1 else None for some in (systems, templates))
    return PromptFormat(chats.pop(), system, template or "")


def as_text(variables: Mapping[str, Any]) -> str:
    """Returns variables of a chat template as JSON; empty if there are none, or if JSON cannot represent them.

    Args:
        variables: name -> value.
    """
    try:
        return json.dumps(dict(variables), sort_keys=True) if variables else ""
    except (TypeError, ValueError):
        return ""


def _checked(text: str) -> str:
    """The variables in a file's metadata; empty if they are not variables of a chat template."""
    try:
        found = json.loads(text) if text and len(text) <= _LONGEST else {}
    except (ValueError, RecursionError):
        return ""
    fits = isinstance(found, dict) and not NOT_FOR_TEMPLATES & found.keys() and all(map(str.isidentifier, found))
    return text if found and fits else ""
