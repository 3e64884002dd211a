"""The format of the rows that an adapter was trained on, so that prompts can use the same format.

It is an attribute of the adapter's config that copies of the config keep, and it is saved in the metadata of the tensor
file, which PEFT does not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.errors import few
from nbpeft.names import ROW_CHOICES

_ATTRIBUTE = "_prompt_format"
_CHAT, _SYSTEM, _TEMPLATE = "nbpeft.prompt.chat", "nbpeft.prompt.system", "nbpeft.prompt.template"
_CLASSES = "nbpeft.classes"
_REASONING = "nbpeft.prompt.reasoning"
_LONG, _MAX_LENGTH = "nbpeft.prompt.long", "nbpeft.prompt.max_length"
_LONGEST = 100_000
"""Most characters of a system prompt, or of the names of classes, that are read from a file."""
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
        classes: names of a classifier's classes, by number; empty for a language model, or if they have no names.
        learns_reasoning: whether the reasoning of the assistant, if the rows have any, was learned.
        long: what happened to rows that are too long, see ``ROW_CHOICES``.
        max_length: the greatest number of tokens of a row, where longer ones were not cut; else None.
    """

    chat: bool
    system: str | None = ""
    template: str = ""
    classes: tuple[str, ...] = ()
    learns_reasoning: bool = True
    long: str = "cut"
    max_length: int | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables passed to the chat template."""
        found: dict[str, Any] = json.loads(self.template or "{}")
        return found

    def to_metadata(self) -> dict[str, str]:
        """Returns entries for a file's metadata."""
        found = {_CHAT: str(self.chat).lower(), _TEMPLATE: self.template}
        found[_REASONING] = "" if self.learns_reasoning else "false"
        if self.system is not None:
            found[_SYSTEM] = self.system
        if self.classes:
            found[_CLASSES] = json.dumps(self.classes)
        if self.max_length is not None:
            found |= {_LONG: self.long, _MAX_LENGTH: str(self.max_length)}
        return {name: value for name, value in found.items() if value or name == _SYSTEM}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> PromptFormat | None:
        """Returns the format in a file's metadata; None if it is missing or invalid."""
        chat, system = metadata.get(_CHAT), metadata.get(_SYSTEM)
        if chat not in ("true", "false") or len(system or "") > _LONGEST:
            return None
        return cls(
            chat == "true",
            system,
            _checked(metadata.get(_TEMPLATE, "")),
            _names(metadata.get(_CLASSES, "")),
            metadata.get(_REASONING) != "false",
            *_lengths(metadata.get(_LONG, ""), metadata.get(_MAX_LENGTH, "")),
        )


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
    templates = {form.template for form in found}
    if len(chats) != 1:
        return None
    system, template = (some.pop() if len(some) == 1 else None for some in (systems, templates))
    classes = {form.classes for form in found}
    learned = any(form.learns_reasoning for form in found)
    lengths = {(form.long, form.max_length) for form in found}
    length = lengths.pop() if len(lengths) == 1 else ("cut", None)
    classes_of_all = classes.pop() if len(classes) == 1 else ()
    return PromptFormat(chats.pop(), system, template or "", classes_of_all, learned, *length)


def are_unnamed(names: Iterable[tuple[str, int]]) -> bool:
    """Returns whether classes have only the names that transformers gives them: ``LABEL_0`` etc.

    Args:
        names: (name, number) of each class.
    """
    return all(name == f"LABEL_{number}" for name, number in names)


def class_numbers(config: Any) -> dict[str, int]:
    """Returns name -> number of the classes in a config of transformers.

    ``from_pretrained(…, id2label=…)`` leaves ``label2id`` as it was, so that only one of them may have names.
    """
    numbers = {name: int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    if not are_unnamed(numbers.items()):
        return numbers
    return {name: int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}


def name_classes(model: Any, form: PromptFormat | None) -> Callable[[], None]:
    """Gives the classes of a model the names of a format, if there are as many of them and they have none.

    Args:
        model: a model of transformers, or any other.
        form: the format of the rows of an adapter; None if it is unknown.

    Returns:
        A function that takes the names back.
    """
    config: Any = getattr(model, "config", None)
    classes = () if form is None else form.classes
    former: tuple[Any, Any] = getattr(config, "id2label", None), getattr(config, "label2id", None)

    def put(names: Any, numbers: Any) -> None:
        config.id2label, config.label2id = names, numbers

    if not classes or former[0] is None or len(former[0]) != len(classes):
        return lambda: None
    if not are_unnamed(class_numbers(config).items()):
        return lambda: None
    put(dict(enumerate(classes)), {name: number for number, name in enumerate(classes)})
    return lambda: put(*former)


def other_classes(model: Any, form: PromptFormat | None) -> str:
    """Returns a message if the classes of a format have other names, or another order, than those of a model."""
    numbers = class_numbers(getattr(model, "config", None))
    own = tuple(sorted(numbers, key=numbers.__getitem__))
    if form is None or form.classes in ((), own) or are_unnamed(numbers.items()):
        return ""
    return f"the adapter's classes are {few(form.classes, 8)}, but the model's config keeps the names {few(own, 8)}"


def as_text(variables: Mapping[str, Any]) -> str:
    """Returns variables of a chat template as JSON; empty if there are none, or if JSON cannot represent them.

    Args:
        variables: name -> value.
    """
    try:
        return json.dumps(dict(variables), sort_keys=True) if variables else ""
    except (TypeError, ValueError):
        return ""


def _names(text: str) -> tuple[str, ...]:
    """The names of classes in a file's metadata; none if they are not different texts."""
    try:
        found = json.loads(text) if text and len(text) <= _LONGEST else []
    except (ValueError, RecursionError):
        return ()
    fits = isinstance(found, list) and all(isinstance(name, str) for name in found) and len({*found}) == len(found)
    return tuple(found) if fits else ()


def _lengths(long: str, max_length: str) -> tuple[str, int | None]:
    """What happens to long rows, and their length, in a file's metadata; the usual if they are not valid."""
    valid = long in ROW_CHOICES["long"] and re.fullmatch("[1-9][0-9]{0,8}", max_length, re.ASCII)
    return (long, int(max_length)) if valid else ("cut", None)


def _checked(text: str) -> str:
    """The variables in a file's metadata; empty if they are not variables of a chat template."""
    try:
        found = json.loads(text) if text and len(text) <= _LONGEST else {}
    except (ValueError, RecursionError):
        return ""
    fits = isinstance(found, dict) and not NOT_FOR_TEMPLATES & found.keys() and all(map(str.isidentifier, found))
    return text if found and fits else ""
